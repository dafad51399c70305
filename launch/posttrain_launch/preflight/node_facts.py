"""What one node is like, before anything is loaded on it: a small JSON file that it writes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_dist.files import read_object, write_atomic
from posttrain_launch.preflight.gpu_state import Gpu, GpuState, current_gpus
from posttrain_launch.run.versions import installed_versions

# Whose versions must be those of all other nodes.
PACKAGES = (
    "posttrain-dist",
    "torch",
    "transformers",
    "deepspeed",
    "ray",
    "peft",
    "bitsandbytes",
    "numpy",
    "triton",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One node at one start of a job. Bytes and seconds."""

    node: str
    start: str  # of the job: "<id>.<restarts>"
    versions: dict[str, str]
    config: str  # SHA-256 of config.yaml, as this node reads it
    gpus: GpuState
    free_bytes: int  # where the run folder is
    temp_free_bytes: int  # where Ray's sockets and logs go
    shared_memory_bytes: int  # free in /dev/shm
    clock_s: float | None = None  # this clock minus that of the first node; None: not compared
    round_trip_s: float | None = None  # to the first node and back
    unreachable: str | None = None  # why the first node could not be reached
    all_reduce_gb_s: float | None = None  # bus bandwidth, 10^9 bytes/s
    all_reduce_error: str | None = None

    def replace(self, **values: Any) -> NodeFacts:
        """A copy with other values."""
        return dataclasses.replace(self, **values)


def look(run_folder: Path, node: str, start: str) -> NodeFacts:
    """This node.

    Raises:
        OSError: the run folder cannot be read here.
    """
    temp = Path(os.environ.get("POSTTRAIN_TEMP", "/tmp/ray")).parent
    return NodeFacts(
        node=node,
        start=start,
        versions=installed_versions(PACKAGES),
        config=hashlib.sha256((run_folder / "config.yaml").read_bytes()).hexdigest(),
        gpus=current_gpus(),
        free_bytes=shutil.disk_usage(run_folder).free,
        temp_free_bytes=_free(temp),
        shared_memory_bytes=_free(Path("/dev/shm")),
    )


def write_facts(run_folder: Path, facts: NodeFacts) -> None:
    """Write logs/nodes/<node>.json of a run folder.

    Raises:
        OSError: it cannot be written here.
    """
    path = folder_of(run_folder) / f"{facts.node}.json"
    write_atomic(path, json.dumps(dataclasses.asdict(facts), indent=1) + "\n")


def read_facts(run_folder: Path, start: str) -> dict[str, NodeFacts]:
    """Node -> what it wrote at this start of a job, of those that have."""
    found = {}
    folder = folder_of(run_folder)
    # Listed, for a network file system keeps it in mind for a while that a name was not there.
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        if not name.endswith(".json") or name.startswith("."):
            continue
        values = read_object(folder / name)
        if values.get("start") == start and "versions" in values:
            facts = _facts(values)
            found[facts.node] = facts
    return found


def folder_of(run_folder: Path) -> Path:
    """Where the facts of a run folder are."""
    return run_folder / "logs" / "nodes"


def _facts(values: dict[str, Any]) -> NodeFacts:
    state = dict(values["gpus"])
    gpus = GpuState(**{**state, "gpus": [Gpu(**each) for each in state["gpus"]]})
    return NodeFacts(**{**values, "gpus": gpus})


def _free(folder: Path) -> int:
    """Bytes that are free there; 0 where there is no such folder."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
