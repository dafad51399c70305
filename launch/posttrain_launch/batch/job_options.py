"""`config.cluster` as the options of sbatch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from posttrain_dist.config import RunConfig, Slurm
from posttrain_dist.config.cluster import GpuRequest
from posttrain_dist.config.job_rules import time_limit_s
from posttrain_dist.errors import ConfigError
from posttrain_launch.lifecycle.lead import FLOOR_S, within_limit
from posttrain_launch.lifecycle.measured import lead_of

Options = Mapping[str, str | int | None]
_LONGEST_SIGNAL_S = 65_535  # that sbatch takes


def options(
    name: str,
    cluster: Slurm,
    run_folder: Path,
    *,
    lead_s: float = FLOOR_S,
    changes: Options | None = None,
) -> list[str]:
    """The options of sbatch, one per #SBATCH line.

    Args:
        name: of the job.
        run_folder: where its log goes, and where it begins.
        lead_s: seconds before the time limit at which the run is to save.
        changes: options that replace those, or are added, by their long names: {"array": "0-5%2"};
            None leaves one out.

    Raises:
        ConfigError: the folder's name cannot stand in a job script.
    """
    values: dict[str, str | int | None] = {
        "job-name": name,
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": _cpus(cluster),
        **_gpus(cluster),
        "mem": cluster.memory_per_node,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": ",".join(cluster.exclude) or None,
        "reservation": cluster.reservation,
        "mail-user": cluster.mail,
        "mail-type": ",".join(cluster.mail_events) if cluster.mail else None,
        "chdir": _path(run_folder),
        "output": _path(run_folder / "logs" / "slurm-").replace("%", "%%") + "%j.log",
        "open-mode": "append",  # a job that is queued again keeps its log
        "signal": f"B:USR1@{min(math.ceil(lead_s), _LONGEST_SIGNAL_S)}",
        **(changes or {}),
    }
    found = [f"--{key}={_quoted(value)}" for key, value in values.items() if value is not None]
    return [*found, "--requeue" if cluster.requeue else "--no-requeue", *cluster.extra]


def signal_lead(config: RunConfig, run_folder: Path) -> tuple[float, str]:
    """Seconds before the time limit at which Slurm is to signal, and what they follow from.

    The lead that is known as the job is written (`lifecycle.measured.lead_of`): of a run that is
    submitted again, from its measured saves. At most half of the time limit. The driver stops the
    run by what it measures meanwhile; the signal comes where that fails.
    """
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    lead_s, source = lead_of(run_folder)
    return math.ceil(within_limit(lead_s, time_limit_s(cluster))), source


def resources(cluster: Slurm) -> str:
    """What a job is given, in words."""
    each = f"{cluster.gpus_per_node or 0} GPUs and {_cpus(cluster)} CPUs"
    return f"{cluster.nodes} nodes with {each} each, time {cluster.time or 'of the partition'}"


def _cpus(cluster: Slurm) -> int:
    """CPUs of a node: every worker has its share, and Python and NCCL threads beside it."""
    if cluster.cpus_per_node is not None:
        return cluster.cpus_per_node
    return max(2, math.ceil(max(4.0, cluster.cpus_per_worker) * (cluster.gpus_per_node or 0)))


def _gpus(cluster: Slurm) -> dict[str, str]:
    if not cluster.gpus_per_node:
        return {}
    kind = [cluster.gpu_type] if cluster.gpu_type else []
    if cluster.gpu_request is GpuRequest.gres:
        return {"gres": ":".join(["gpu", *kind, str(cluster.gpus_per_node)])}
    return {"gpus-per-node": ":".join([*kind, str(cluster.gpus_per_node)])}


def _path(path: Path) -> str:
    if not str(path).isprintable() or "\\" in str(path):  # Slurm replaces no %j beside a backslash
        raise ConfigError(
            f"makes the run folder {str(path)!r}, whose name cannot stand in a job script",
            where="output_root",
            fix="set output_root to a folder without backslashes and control characters",
        )
    return str(path)


def _quoted(value: str | int) -> str:
    """A value as sbatch reads it: it splits words and knows quotes, comments and backslashes."""
    text = str(value)
    if not any(letter.isspace() or letter in "\"'\\#" for letter in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
