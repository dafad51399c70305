"""The node that a run is planned for: the group `hardware`, the table of devices, what is here."""

from __future__ import annotations

import re

from posttrain_dist.config import RunConfig, Slurm
from posttrain_dist.config.devices import DEVICES
from posttrain_dist.config.hardware import Hardware, with_nodes
from posttrain_dist.config.this_machine import ThisMachine, check_hardware, look_here, trains_here
from posttrain_dist.errors import ConfigError
from posttrain_dist.planner.job import Machine

GIB = 1 << 30
# Where nothing says more: Ethernet of 10 Gb/s, what programs copy inside a host, one local disk.
_NETWORK_GB_S = 1.25
_CPU_LINK_GB_S = 5.0
_STORAGE_GB_S = 1.0
_SLURM_MEMORY = {"": 1 << 20, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class UnknownMachine(ConfigError):
    """Nothing says what the nodes have: no plan can be made, and a run may go on without one."""


def find_machine(config: RunConfig, *, plans_only: bool) -> Machine:
    """One node of those that the run is for.

    Values of `hardware` count first, then what the table of devices says of its GPU. Where the run
    is one of this machine, the rest is looked up here.

    Args:
        config: completed.
        plans_only: nothing will be started: the hardware need not be here.

    Raises:
        UnknownMachine: the nodes are elsewhere, and `hardware` does not say what they have.
        ConfigError: `hardware` counts GPUs that nothing names.
        ClusterError: `hardware` says other GPUs than this machine has, and the run starts here.
    """
    hardware, cluster = config.hardware, with_nodes(config.cluster, config.hardware)
    elsewhere = not trains_here(cluster)
    here: ThisMachine | None = None
    if not elsewhere and not (plans_only and _is_described(hardware)):
        here = look_here()
        if not plans_only:
            check_hardware(hardware, cluster, here)
    gpus = hardware.gpus_per_node
    if isinstance(cluster, Slurm):
        gpus = cluster.gpus_per_node  # of each node so many are asked for
    if gpus is None and here is not None:
        gpus = here.gpus
    gpu = None if gpus == 0 else hardware.gpu or (here.gpu if here else None)
    if gpus and gpu is None and here is not None:
        raise ConfigError(
            f"is {gpus}, and there is no GPU: none is here, and hardware.gpu names none",
            where="hardware.gpus_per_node",
            fix="use a preset with GPUs, such as hardware=h100x8, or set hardware.gpu=<its name>",
        )
    missing = _missing(config, gpu, gpus, here)
    if missing:
        raise UnknownMachine(
            "does not say what the nodes have, and they are not this machine"
            if elsewhere
            else "does not say all that a node has, and describes another machine than this",
            where="hardware",
            fix="use a preset, such as hardware=h100x8 (conf/hardware holds them), or set "
            + ", ".join(missing),
        )
    return _machine(hardware, cluster, gpu, gpus or 0, here)


def _is_described(hardware: Hardware) -> bool:
    """Whether another machine than this may be meant."""
    host = hardware.host_memory_gib is not None and hardware.cpus_per_node is not None
    return hardware.gpu is not None or (hardware.gpus_per_node == 0 and host)


def _missing(
    config: RunConfig, gpu: str | None, gpus: int | None, here: ThisMachine | None
) -> list[str]:
    """Keys that nothing gives a value to."""
    if here is not None:
        return []
    hardware, cluster = config.hardware, config.cluster
    values = {
        "hardware.gpu": gpu if gpus != 0 else "none",
        "hardware.gpus_per_node": gpus,
        "hardware.host_memory_gib": hardware.host_memory_gib or _slurm_memory(cluster),
        "hardware.cpus_per_node": hardware.cpus_per_node or getattr(cluster, "cpus_per_node", None),
    }
    return [key for key, value in values.items() if value is None]


def _machine(
    hardware: Hardware, cluster: object, gpu: str | None, gpus: int, here: ThisMachine | None
) -> Machine:
    device = DEVICES[gpu] if gpu else None
    same = here if here is not None and here.gpu == gpu else None
    gpu_memory = 0
    if device is not None:
        found = same.gpu_memory_bytes if same else device.memory_bytes
        gpu_memory = int((hardware.gpu_memory_gib or 0) * GIB) or found
    memories = [
        (hardware.host_memory_gib or 0) * GIB,
        _slurm_memory(cluster) or 0,
        here.host_memory_bytes if here else 0,
    ]
    cpus = [
        getattr(cluster, "cpus_per_node", None) or hardware.cpus_per_node or 0,
        here.cpus if here else 0,
    ]
    network = hardware.network_gb_s
    if network is None and here is not None and here.network_bytes_s:
        network = here.network_bytes_s / max(1, gpus) / 1e9
    link = hardware.link_gb_s or (device.link_gb_s if device else _CPU_LINK_GB_S)
    host_link = hardware.host_link_gb_s or (device.host_link_gb_s if device else _CPU_LINK_GB_S)
    return Machine(
        gpu=gpu,
        gpus_per_node=gpus,
        gpu_memory_bytes=gpu_memory,
        host_memory_bytes=int(min(size for size in memories if size)),
        cpus_per_node=min(count for count in cpus if count),
        link_bytes_s=link * 1e9,
        network_bytes_s=(network or _NETWORK_GB_S) * 1e9,
        host_link_bytes_s=host_link * 1e9,
        storage_bytes_s=(hardware.storage_gb_s or _STORAGE_GB_S) * 1e9,
        node_failure_s=hardware.node_failure_hours * 3600,
        margin=hardware.margin,
    )


def _slurm_memory(cluster: object) -> int | None:
    """Bytes that a job asks for of a node, `64G`; a number alone is of MiB; "0" is all."""
    text = cluster.memory_per_node if isinstance(cluster, Slurm) else None
    found = re.fullmatch(r"(\d+)([KMGT]?)[Bb]?", (text or "").strip(), re.IGNORECASE)
    if found is None or not int(found[1]):
        return None
    return int(found[1]) * _SLURM_MEMORY[found[2].upper()]
