"""The group `cluster`: how the processes of a run come about. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from posttrain_dist.errors import Rule, at_least

MAX_MACHINES = 100_000  # nodes, CPUs, GPUs
# Not of digits alone: minutes, as which nobody means the 28800 that YAML makes of 8:00:00.
_TIME = re.compile(r"\d+:\d{1,2}(:\d{1,2})?|\d+-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED|infinite")


@dataclass(kw_only=True, slots=True)
class Cluster:
    """The slot `cluster`: how the processes of a run come about."""


@dataclass(kw_only=True, slots=True)
class Local(Cluster):
    """This process, no Ray."""


@dataclass(kw_only=True, slots=True)
class Ray(Cluster):
    """Ray Train workers, on a local Ray or on a running cluster."""

    workers: int | None = None  # null: one per GPU of the cluster, or 1 where it has none
    address: str | None = None  # "host:port" of a running Ray; null: start one here
    cpus_per_worker: float = 1.0
    max_failures: int = 1  # times that a lost worker is replaced and the run resumed


@dataclass(kw_only=True, slots=True)
class Slurm(Ray):
    """Ray inside a Slurm job; `posttrain submit` writes the job. `address` is set in the job."""

    nodes: int = 1
    gpus_per_node: int | None = None  # 0: a job on CPUs; `posttrain submit` wants it said
    cpus_per_node: int | None = None  # null: 4 for each GPU of a node, 2 where it has none
    memory_per_node: str | None = None  # as Slurm's --mem: "64G"
    partition: str | None = None
    account: str | None = None
    time: str | None = None  # as Slurm's --time, "08:00:00"; `posttrain submit` wants it said
    network_interface: str | None = None  # for gloo and NCCL, e.g. "eth0"; null: they choose
    requeue: bool = True  # back into the queue at the time limit, after preemption, a lost node
    start_deadline_s: int = 300  # until Ray has all nodes and GPUs of the job
    extra: list[str] = field(default_factory=list)  # more sbatch options: ["--qos=high"]


def cluster_rules(cluster: Cluster) -> list[Rule]:
    """What must hold among the values of the group `cluster`."""
    if not isinstance(cluster, Ray):
        return []
    rules = [
        at_least("cluster.workers", cluster.workers, 1, MAX_MACHINES),
        at_least("cluster.max_failures", cluster.max_failures, 0),
        Rule(
            0 < cluster.cpus_per_worker <= MAX_MACHINES,
            "cluster.cpus_per_worker",
            f"is {cluster.cpus_per_worker}, must be above 0 and at most {MAX_MACHINES:,}",
            "set it to 1 or more",
        ),
    ]
    if isinstance(cluster, Slurm):
        rules += [
            at_least("cluster.nodes", cluster.nodes, 1, MAX_MACHINES),
            at_least("cluster.cpus_per_node", cluster.cpus_per_node, 1, MAX_MACHINES),
            at_least("cluster.start_deadline_s", cluster.start_deadline_s, 1),
            at_least("cluster.gpus_per_node", cluster.gpus_per_node, 0, MAX_MACHINES),
            Rule(
                cluster.time is None or bool(_TIME.fullmatch(cluster.time)),
                "cluster.time",
                f"is {cluster.time!r}, which Slurm does not read",
                "write hours:minutes:seconds or days-hours:minutes:seconds, such as 08:00:00; in a "
                'YAML file in quotes, time: "08:00:00", for it is a number there otherwise',
            ),
        ]
    return rules
