"""`posttrain submit cluster=ray`: a run becomes a job of a cluster that is there.

With folders that the cluster shares, the run folder is made here. From a machine that shares
nothing (`cluster.shared_folders=false`) the config travels as text, and the run folder is made on
the cluster (`arrival.py`); files are looked at there.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from posttrain_dist.config import Ray, RunConfig, complete
from posttrain_dist.config.ray_rules import job_api
from posttrain_dist.errors import ClusterError, ConfigError, PosttrainError, raise_all
from posttrain_dist.files import write_atomic
from posttrain_launch.compose.composer import Composed
from posttrain_launch.compose.paths import PREFIXES, RESERVED, with_absolute_paths
from posttrain_launch.lifecycle.exit_codes import Exit
from posttrain_launch.ray import remote
from posttrain_launch.ray.jobs.arrival import SENT, to_text
from posttrain_launch.run.job_record import FILE, JobRecord, new_record, read_job, write_job

STUBS = Path("outputs")  # where a machine without the run folders keeps what it sent


def send_run(
    config: RunConfig, run_folder: Path, *, dry_run: bool = False, wait: bool = False
) -> int:
    """Have a cluster start, or go on with, a run whose folder it sees; job.json says which job.

    Args:
        dry_run: print what would be sent, and send nothing.
        wait: print what the run prints, to its end.

    Returns:
        The exit code: 0, or with `wait` that of the run.

    Raises:
        ConfigError: `cluster.address` is not that of a job API.
        ClusterError: the cluster cannot be reached or refuses, or a job drives the run already.
    """
    cluster = config.cluster
    assert isinstance(cluster, Ray)
    program = cluster.program or f"{sysconfig.get_path('scripts')}/posttrain"
    arguments = ["run", str(run_folder), "--address", "auto"]
    request = remote.request_to_run(job_api(cluster.address), config.name, program, arguments)
    if dry_run:
        print(f"{request.lines()}\n# dry run, nothing submitted; the run is {run_folder}")
        return 0
    _refuse_driven(run_folder)
    record = _send(request, run_folder, f"{run_folder}  (done when it holds FINISHED)")
    return follow(record) if wait else 0


def send_text(
    composed: Composed,
    command: str,
    *,
    force: bool = False,
    dry_run: bool = False,
    wait: bool = False,
) -> int:
    """Send a run to a cluster whose files are not here; job.json and sent.yaml are kept here.

    Args:
        command: the command line, kept as the run's lineage.
        force: also start one that cannot fit.
        dry_run: print what would be sent, and send nothing.
        wait: print what the run prints, to its end.

    Returns:
        The exit code: 0, or with `wait` that of the run.

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
        return 0
    stub = (STUBS / config.name / request.job_id.removeprefix(f"{config.name}-")).absolute()
    stub.mkdir(parents=True)
    write_atomic(stub / "sent.yaml", config.to_yaml())
    root = f"{config.output_root}/{config.name}/, on the cluster"
    try:
        record = _send(request, stub, f"{root}  (done when it holds FINISHED)")
    except ClusterError:
        shutil.rmtree(stub)
        raise
    return follow(record) if wait else 0


def _refuse_driven(run_folder: Path) -> None:
    """Refuse a run that a job of Ray drives: two would write the same files."""
    record = read_job(run_folder)
    if record is None or record.system != "ray":
        return
    try:
        found = remote.state(record)
    except ClusterError:  # of a cluster that is gone, and its jobs with it
        return
    if found.exit_code is None:
        raise ClusterError(
            f"the job {record.id} drives this run already ({found.state})",
            where=str(run_folder),
            fix="wait for it, or end it with posttrain cancel",
        )


def _send(request: remote.Request, folder: Path, run: str) -> JobRecord:
    """Submit a job; its record is there before it, for whoever is killed in between."""
    record = new_record("ray", request.job_id, request.address)
    before = read_job(folder)
    write_job(folder, record)
    try:
        remote.submit(request)
    except ClusterError:
        if before is None:
            (folder / FILE).unlink()
        else:
            write_job(folder, before)
        raise
    here = shlex.quote(str(folder))
    print(f"submitted job {record.id} to {request.address}")
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
        "objective.reference_model": getattr(config.objective, "reference_model", None),
        "engine.config": getattr(config.engine, "config", None),
        **{f"data.sources.{name}.path": each.path for name, each in config.data.sources.items()},
    }
    if config.template.name.endswith(".jinja"):
        found["template.name"] = config.template.name
    if config.train.resume not in ("auto", "never"):
        found["train.resume"] = config.train.resume
    return {key: path for key, path in found.items() if path is not None}
