"""`config.cluster` as the options of sbatch."""

from __future__ import annotations

import math
from pathlib import Path

from posttrain_dist.config import Slurm

# USR1 this long before the time limit: time for one step, a checkpoint and the end of Ray. A model
# that needs more asks for it: cluster.extra=["--signal=B:USR1@600"].
SIGNAL_BEFORE_END_S = 120


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


def resources(cluster: Slurm) -> str:
    """What a job is given, in words."""
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
