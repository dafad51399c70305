"""`posttrain submit`: render the Slurm job of a frozen run, and send it.

The job script is whole and readable: #SBATCH lines from `config.cluster`, a few variables, and the
shell of `slurm/job.sh`. It stays in the run folder as `job.sbatch` and can be sent again by hand.
"""

from __future__ import annotations

import importlib.resources
import math
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from posttrain_dist.config import RunConfig, Slurm
from posttrain_dist.errors import ClusterError, ConfigError
from posttrain_dist.files import write_atomic

# USR1 this long before the time limit: time for one step, a checkpoint and the end of Ray. A model
# that needs more asks for it: cluster.extra=["--signal=B:USR1@600"].
SIGNAL_BEFORE_END_S = 120


def submit(config: RunConfig, run_folder: Path, dry_run: bool = False) -> str | None:
    """Write `job.sbatch` into the run folder and submit it, or only print it.

    Args:
        config: the frozen run; `config.cluster` is Slurm.
        run_folder: holds config.yaml; on a file system that all nodes see.
        dry_run: print the script and submit nothing.

    Returns:
        The job's id; None for a dry run.

    Raises:
        ConfigError: the run is not one for Slurm.
        ClusterError: there is no sbatch here, or it refuses the job.
    """
    if not isinstance(config.cluster, Slurm):
        raise ConfigError(
            "a job is submitted to Slurm, and this run is not set up for it",
            where="cluster",
            fix="add cluster=slurm and, for instance, cluster.nodes=2",
        )
    script = run_folder / "job.sbatch"
    text = render(config, run_folder)
    write_atomic(script, text)
    script.chmod(0o755)
    (run_folder / "logs").mkdir(exist_ok=True)  # Slurm opens its log there before the job begins
    if dry_run:
        print(text)
        print(f"# dry run, nothing submitted; the script is {script}")
        return None
    job_id = _sbatch(script)
    print(f"submitted job {job_id}")
    print(f"  asks for:  {_resources(config.cluster)}")
    print(f"  state:     squeue --job {job_id}")
    print(f"  progress:  tail -F {shlex.quote(str(run_folder / 'logs' / f'slurm-{job_id}.log'))}")
    print(f"  cancel:    scancel {job_id}")
    print(f"  run:       {run_folder}  (done when it holds FINISHED)")
    return job_id


def render(config: RunConfig, run_folder: Path) -> str:
    """The text of the job script; `config.cluster` is Slurm."""
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    variables = {
        "POSTTRAIN_RUN": str(run_folder),
        "POSTTRAIN_BIN": sysconfig.get_path("scripts"),
        "POSTTRAIN_INTERFACE": cluster.network_interface or "",
    }
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options(config.name, cluster, run_folder)),
        "",
        "# Written by `posttrain submit`; may be sent again with sbatch.",
        f"# {SIGNAL_BEFORE_END_S} s before the time limit the run saves, ends and is queued again.",
        "# Where a step and a checkpoint take longer: cluster.extra=['--signal=B:USR1@600'].",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "",
    ]
    body = importlib.resources.files("posttrain_launch.slurm").joinpath("job.sh").read_text("utf-8")
    return "\n".join(lines) + "\n" + body.removeprefix("#!/bin/bash\n")


def options(name: str, cluster: Slurm, run_folder: Path) -> list[str]:
    """The options of sbatch, one per #SBATCH line."""
    log = str(run_folder / "logs" / "slurm-").replace("%", "%%") + "%j.log"
    values: dict[str, str | int | None] = {
        "job-name": name,
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": _cpus(cluster),
        "gpus-per-node": cluster.gpus_per_node or None,
        "mem": cluster.memory_per_node,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "chdir": str(run_folder),
        "output": log,
        "open-mode": "append",  # a job that is requeued keeps its log
        "signal": f"B:USR1@{SIGNAL_BEFORE_END_S}",
    }
    set_options = [
        f"--{key}={_quoted(value)}" for key, value in values.items() if value is not None
    ]
    return [*set_options, "--requeue", *cluster.extra]


def _resources(cluster: Slurm) -> str:
    each = f"{cluster.gpus_per_node or 0} GPUs and {_cpus(cluster)} CPUs"
    return f"{cluster.nodes} nodes with {each} each, time {cluster.time or 'of the partition'}"


def _cpus(cluster: Slurm) -> int:
    """CPUs of a node: every worker has its share, and Python and NCCL threads beside it."""
    if cluster.cpus_per_node is not None:
        return cluster.cpus_per_node
    return max(2, math.ceil(max(4.0, cluster.cpus_per_worker) * (cluster.gpus_per_node or 0)))


def _quoted(value: str | int) -> str:
    text = str(value)
    return f'"{text}"' if any(letter.isspace() for letter in text) else text


def _sbatch(script: Path) -> str:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ClusterError(
            "there is no sbatch on this machine",
            where="cluster",
            fix=f"submit on a login node of the cluster: sbatch {script}",
        )
    done = subprocess.run(
        [sbatch, "--parsable", str(script)],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    if done.returncode != 0:
        answer = (done.stderr or done.stdout).strip().replace("\n", "; ")
        raise ClusterError(
            f"sbatch refused the job: {answer}",
            where=str(script),
            fix="change the cluster.* value that it names (partition, account, time, nodes …)",
        )
    return done.stdout.strip().split(";")[0]  # "id" or "id;cluster"
