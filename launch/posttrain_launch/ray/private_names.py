"""What this project uses of Ray that is private to it, behind one switch.

It saves seconds of the start, and keeps a run's own Ray to the loopback. None of it is needed: on
a Ray that was not tested the plain public trainer runs, on Ray's own terms. POSTTRAIN_RAY_PRIVATE=0
does the same by hand.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

TESTED = ("2.60",)  # minor versions
SWITCH = "POSTTRAIN_RAY_PRIVATE"
# Module and name, for a test on the versions above; those of `lean_trainer.py` with their class.
NAMES = (
    ("ray._private.services", "resolve_ip_for_localhost"),
    ("ray.train.v2.api.data_parallel_trainer", "DataParallelTrainer._create_default_callbacks"),
    (
        "ray.train.v2.api.data_parallel_trainer",
        "DataParallelTrainer._initialize_and_run_controller",
    ),
    ("ray.train.v2._internal.callbacks", "DatasetsCallback"),
    (
        "ray.train.v2._internal.callbacks.placement_group_callback",
        "PlacementGroupCleanerCallback",
    ),
    (
        "ray.train.v2._internal.execution.scaling_policy.scaling_policy",
        "ScalingPolicy._send_resource_request",
    ),
    (
        "ray.train.v2._internal.execution.scaling_policy.scaling_policy",
        "ScalingPolicy._maybe_send_resource_request",
    ),
    (
        "ray.train.v2._internal.execution.scaling_policy.scaling_policy",
        "ScalingPolicy._cancel_resource_request",
    ),
)


def are_used() -> bool:
    """Whether this Ray was tested with them, and nobody switched them off."""
    return os.environ.get(SWITCH) != "0" and ray.__version__.startswith(
        tuple(f"{version}." for version in TESTED)
    )


def unused_because() -> str:
    """Why they are not used, for the log."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0: Ray's plain trainer is used"
    return (
        f"Ray {ray.__version__} was not tested ({', '.join(TESTED)} was): its plain trainer is used"
    )


def own_ray_options(folder: Path | None) -> dict[str, Any]:
    """Arguments of `ray.init` for a Ray of our own: its folder, and the loopback.

    Args:
        folder: for its sockets and logs, below which it makes what it needs; null: Ray's own.
    """
    if not are_used():
        if folder is not None:
            os.environ["RAY_TMPDIR"] = str(folder.parent)  # Ray makes `ray/` in it
        return {}
    _stay_on_loopback()
    place = {} if folder is None else {"_temp_dir": str(folder)}
    return {**place, "_node_ip_address": "127.0.0.1"}


def _stay_on_loopback() -> None:
    """Let the processes of our own Ray listen on 127.0.0.1 alone.

    They do where that is the node's address, but Ray puts one that others can reach in its place,
    and then they listen on all interfaces.
    """
    from ray._private import services

    services.resolve_ip_for_localhost = lambda host: host
