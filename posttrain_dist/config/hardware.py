"""The group `hardware`: what ONE node has, for the planner. No torch.

`cluster.nodes` counts the nodes. What is null is what is here, looked up when a run is planned.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain_dist.errors import Rule, at_least


@dataclass(kw_only=True, slots=True)
class Hardware:
    """One node."""

    # A name of the planner's table of devices (h100, h200, a100_80, ...), or none: no GPU.
    gpu: str | None = None
    gpus_per_node: int | None = None
    gpu_memory_gib: float | None = None  # of each GPU, as the driver says it
    host_memory_gib: float | None = None
    cpus_per_node: int | None = None
    link_gb_s: float | None = None  # of one GPU to the others of its node, one direction
    network_gb_s: float | None = None  # of one GPU to those of other nodes, one direction
    host_link_gb_s: float | None = None  # between one GPU and the memory of its host
    storage_gb_s: float | None = None  # of one node to shared storage, when it writes
    # Hours until a node fails, in the mean: what checkpoint intervals follow from.
    node_failure_hours: float = 20_000.0
    margin: float = 0.04  # share of a GPU's memory that a plan leaves free


def hardware_rules(hardware: Hardware) -> list[Rule]:
    """What must hold among the values of the group `hardware`."""
    speeds = ("link_gb_s", "network_gb_s", "host_link_gb_s", "storage_gb_s")
    sizes = ("gpu_memory_gib", "host_memory_gib", "node_failure_hours", *speeds)
    return [
        at_least("hardware.gpus_per_node", hardware.gpus_per_node, 0, 1024),
        at_least("hardware.cpus_per_node", hardware.cpus_per_node, 1, 100_000),
        *(
            Rule(
                getattr(hardware, name) is None or 0 < getattr(hardware, name) <= 1e9,
                f"hardware.{name}",
                f"is {getattr(hardware, name)}, must be above 0",
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
