"""`posttrain submit cluster=ray`: a run becomes a job of a cluster that is there.

With folders that the cluster shares, the run folder is made here. From a machine that shares
nothing (`cluster.shared_folders=false`) the config travels as text, and the run folder is made on
the cluster (`arrival.py`); files are looked at there.
"""

from __future__ import annotations

import json
import shlex
import sys
import sysconfig
from pathlib import Path

from posttrain_dist.config import Ray, RunConfig, complete
from posttrain_dist.config.ray_rules import job_api
from posttrain_dist.errors import ClusterError, ConfigError, PosttrainError, raise_all
from posttrain_dist.files import write_atomic
from posttrain_dist.report.run.plan_section import write_run_plan
from posttrain_dist.report.run.read import read_run
from posttrain_launch.compose.composer import Composed
from posttrain_launch.compose.paths import PREFIXES, RESERVED, with_absolute_paths
from posttrain_launch.lifecycle.exit_codes import Exit
from posttrain_launch.ray import remote
from posttrain_launch.ray.jobs.arrival import SENT, to_text
from posttrain_launch.run.driver import read_frozen
from posttrain_launch.run.freeze import freeze
from posttrain_launch.run.job_record import JobRecord, new_record, write_job

STUBS = Path("outputs")  # where a machine without the run folders keeps what it sent


def send(composed: Composed, command: str, *, force: bool, dry_run: bool, wait: bool) -> int:
    """Send a run to a cluster; the exit code: 0, or with `wait` that of the run.

    Args:
        command: the command line, kept as the run's lineage.
        force: also start one that cannot fit.
        dry_run: print what would be sent, and send nothing.
        wait: print what the run prints, to its end.

    Raises:
        ConfigError: the config is not one for this.
        ClusterError: the cluster cannot be reached or refuses.
    """
    cluster = composed.config.cluster
    assert isinstance(cluster, Ray)
    if cluster.shared_folders:
        folder = freeze(composed, command, force=force)
        write_run_plan(read_run(folder))
        record = send_run(read_frozen(folder), folder, dry_run=dry_run)
    else:
        record = send_text(composed, command, force=force, dry_run=dry_run)
    return follow(record) if record is not None and wait else 0


def send_run(config: RunConfig, run_folder: Path, *, dry_run: bool = False) -> JobRecord | None:
    """Have a cluster go on with, or start, a run whose folder it sees.

    Args:
        dry_run: print what would be sent, and send nothing.

    Returns:
        The job, also kept as job.json; None for a dry run.

    Raises:
        ConfigError: `cluster.address` is not that of a job API.
        ClusterError: the cluster cannot be reached or refuses.
    """
    cluster = config.cluster
    assert isinstance(cluster, Ray)
    program = cluster.program or f"{sysconfig.get_path('scripts')}/posttrain"
    arguments = ["run", str(run_folder), "--address", "auto"]
    request = remote.request_to_run(job_api(cluster.address), config.name, program, arguments)
    if dry_run:
        print(f"{request.lines()}\n# dry run, nothing submitted; the run is {run_folder}")
        return None
    return _send(request, run_folder, f"{run_folder}  (done when it holds FINISHED)")


def send_text(
    composed: Composed, command: str, *, force: bool = False, dry_run: bool = False
) -> JobRecord | None:
    """Send a run to a cluster whose files are not here.

    Args:
        command: the command line, kept as the run's lineage.
        force: also start one that cannot fit.
        dry_run: print what would be sent, and send nothing.

    Returns:
        The job, also kept as job.json beside sent.yaml in a folder of this machine; None for a dry
        run.

    Raises:
        ConfigError: a path depends on the folder that this was typed in.
        ClusterError: the cluster cannot be reached or refuses.
    """
    config = complete(composed.config)
    cluster = config.cluster
    assert isinstance(cluster, Ray)
    raise_all(relative_paths(config))
    address = job_api(cluster.address)
    program = cluster.program or "posttrain"
    request = remote.request_to_run(address, config.name, program, ["run", "-", "--address=auto"])
    request.environment[SENT] = to_text(composed, command, force=force)
    if dry_run:
        shown = json.loads(request.environment.pop(SENT))["config"]
        print(f"{request.lines()}\n{shown}# dry run, nothing submitted")
        return None
    root = f"{config.output_root}/{config.name}/, on the cluster"
    return _send(request, None, f"{root}  (done when it holds FINISHED)", config)


def _send(
    request: remote.Request, run_folder: Path | None, run: str, config: RunConfig | None = None
) -> JobRecord:
    job_id = remote.submit(request)
    record = new_record("ray", job_id, request.address)
    if run_folder is None:
        assert config is not None
        run_folder = (STUBS / config.name / job_id.removeprefix(f"{config.name}-")).absolute()
        run_folder.mkdir(parents=True)
        write_atomic(run_folder / "sent.yaml", config.to_yaml())
    write_job(run_folder, record)
    here = shlex.quote(str(run_folder))
    print(f"submitted job {job_id} to {request.address}")
    print(f"  state:     posttrain status {here}")
    print(f"  progress:  posttrain logs --follow {here}")
    print(f"  cancel:    posttrain cancel {here}")
    print(f"  run:       {run}", flush=True)
    return record


def follow(record: JobRecord) -> int:
    """Print what the run prints, to its end; its exit code. A Ctrl-C leaves the job running.

    Raises:
        ClusterError: the cluster cannot be reached any more.
    """
    try:
        for text in remote.tail(record, follow=True):
            print(text, end="", flush=True)
        found = remote.state(record)
    except KeyboardInterrupt:
        print(f"\nthe job {record.id} goes on", file=sys.stderr)
        raise
    except ClusterError as error:
        lost = f"{error.what}; the job {record.id} goes on if the cluster does"
        raise ClusterError(lost, where=error.where, fix=error.fix) from error
    print(f"{found.state}: {found.reason}" if found.reason else found.state)
    return Exit.failed if found.exit_code is None else found.exit_code


def relative_paths(config: RunConfig) -> list[PosttrainError]:
    """Paths of a config that mean something only here, where it was typed."""
    found: list[PosttrainError] = []
    typed = _paths(config)
    absolute = _paths(with_absolute_paths(config))
    for key, path in typed.items():
        named = path in RESERVED or path.startswith((*PREFIXES, "~"))
        if path and not named and absolute[key] != path:
            found.append(
                ConfigError(
                    f"is {path}, and the cluster has other folders (cluster.shared_folders=false)",
                    where=key,
                    fix=f"write a path of the cluster, as {key}=/shared/{Path(path).name}",
                )
            )
    return found


def _paths(config: RunConfig) -> dict[str, str]:
    found = {
        "model.path": config.model.path,
        "data.train": config.data.train,
        "data.eval": config.data.eval,
        "data.cache": config.data.cache,
        "output_root": config.output_root,
        "tuning.init_from": getattr(config.tuning, "init_from", None),
        "engine.config": getattr(config.engine, "config", None),
        **{f"data.sources.{name}.path": each.path for name, each in config.data.sources.items()},
    }
    if config.template.name.endswith(".jinja"):
        found["template.name"] = config.template.name
    if config.train.resume not in ("auto", "never"):
        found["train.resume"] = config.train.resume
    return {key: path for key, path in found.items() if path is not None}
