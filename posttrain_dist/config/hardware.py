"""The group `hardware`: what ONE node has, for the planner. No torch.

`cluster.nodes` counts the nodes. What is null is what the table of devices says of the GPU, else
what is here, looked up when a run is planned.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from posttrain_dist.config.cluster import Cluster, Slurm
from posttrain_dist.config.devices import DEVICES
from posttrain_dist.errors import Rule, at_least


@dataclass(kw_only=True, slots=True)
class Hardware:
    """One node."""

    # A name of the table of devices: h100, h200, a100_80, rtx4090, ...
    gpu: str | None = None
    gpus_per_node: int | None = None  # 0: the node has no GPU, or none that is used
    gpu_memory_gib: float | None = None  # that programs can have of each GPU
    host_memory_gib: float | None = None
    cpus_per_node: int | None = None
    link_gb_s: float | None = None  # of one GPU to the others of its node, one direction
    network_gb_s: float | None = None  # of one GPU to those of other nodes, one direction
    host_link_gb_s: float | None = None  # between one GPU and the memory of its host
    storage_gb_s: float | None = None  # of one node to shared storage, when it writes
    # Hours until a node fails, in the mean: what checkpoint intervals follow from. Llama 3 lost 419
    # of 2,048 nodes x 54 days to failures (arXiv:2407.21783, 3.3.4).
    node_failure_hours: float = 6_300.0
    margin: float = 0.04  # share of a GPU's memory that a plan leaves free


def hardware_rules(hardware: Hardware) -> list[Rule]:
    """What must hold among the values of the group `hardware`."""
    speeds = ("link_gb_s", "network_gb_s", "host_link_gb_s", "storage_gb_s")
    sizes = ("gpu_memory_gib", "host_memory_gib", "node_failure_hours", *speeds)
    return [
        Rule(
            hardware.gpu is None or hardware.gpu in DEVICES,
            "hardware.gpu",
            f"is {hardware.gpu}, which is not in the table of devices",
            f"use one of {', '.join(DEVICES)}; for another GPU the one that is nearest in speed, "
            "with hardware.gpu_memory_gib",
        ),
        Rule(
            hardware.gpu is None or hardware.gpus_per_node != 0,
            "hardware.gpus_per_node",
            f"is 0, and hardware.gpu is {hardware.gpu}",
            "set hardware.gpus_per_node to 1 or more; for nodes without a GPU use hardware=cpu",
        ),
        *(
            Rule(
                hardware.gpus_per_node != 0 or getattr(hardware, name) is None,
                f"hardware.{name}",
                f"is {getattr(hardware, name)}, and the node has no GPU (hardware.gpus_per_node=0)",
                f"leave hardware.{name} out, or use a preset with GPUs, such as hardware=h100x8",
            )
            for name in ("gpu_memory_gib", "host_link_gb_s")
        ),
        at_least("hardware.gpus_per_node", hardware.gpus_per_node, 0, 1024),
        at_least("hardware.cpus_per_node", hardware.cpus_per_node, 1, 100_000),
        *(
            Rule(
                getattr(hardware, name) is None or 0 < getattr(hardware, name) <= 1e9,
                f"hardware.{name}",
                f"is {getattr(hardware, name)}, must be above 0 and at most 1e9",
                f"set hardware.{name} to what the machine has, or leave it out",
            )
            for name in sizes
        ),
        Rule(
            0 <= hardware.margin < 0.9,
            "hardware.margin",
            f"is {hardware.margin}, must be in [0, 0.9)",
            "set it to the share of a GPU's memory that stays free, such as 0.04",
        ),
    ]


def nodes_rules(hardware: Hardware, cluster: Cluster) -> list[Rule]:
    """A job asks for no more of a node than the node has."""
    if not isinstance(cluster, Slurm):
        return []
    rules = []
    for name in ("gpus_per_node", "cpus_per_node"):
        asked, there = getattr(cluster, name), getattr(hardware, name)
        rules.append(
            Rule(
                asked is None or there is None or asked <= there,
                f"cluster.{name}",
                f"is {asked}, and a node has {there} (hardware.{name})",
                f"set cluster.{name} to {there} or less, or hardware to what the nodes are",
            )
        )
    return rules


def with_nodes(cluster: Cluster, hardware: Hardware) -> Cluster:
    """The cluster, with what is not set of a job's nodes as `hardware` has it.

    CPUs in the share of the node's GPUs that the job takes. Memory is what was set: of a node's
    memory some belongs to its system, and how much only its Slurm knows.
    """
    if not isinstance(cluster, Slurm):
        return cluster
    gpus, cpus = cluster.gpus_per_node, cluster.cpus_per_node
    if gpus is None:
        gpus = hardware.gpus_per_node
    if cpus is None and hardware.cpus_per_node is not None and gpus is not None:
        share = gpus / hardware.gpus_per_node if gpus and hardware.gpus_per_node else 1.0
        cpus = max(1, int(hardware.cpus_per_node * share))
    return dataclasses.replace(cluster, gpus_per_node=gpus, cpus_per_node=cpus)
