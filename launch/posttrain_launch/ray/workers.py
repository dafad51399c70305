"""What runs inside a Ray Train worker: set the process up, then call the library."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from posttrain_dist.errors import ClusterError, PosttrainError
from posttrain_dist.logs import unfailing
from posttrain_launch.ray.gate import wait_for_data


class WorkerError(Exception):
    """A failed training in a form that always travels between processes.

    Args:
        rank: of the worker; None: Ray Train itself.
        text: one line, `ValueError: …`.
        trace: the worker's stack trace.
        error: for the user; a worker sets it for what the user can fix, and it is never retried.
    """

    def __init__(
        self, rank: int | None, text: str, trace: str, error: PosttrainError | None
    ) -> None:
        super().__init__(rank, text, trace, error)
        self.rank, self.text, self.trace, self.error = rank, text, trace, error

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.text}"


def train_worker(settings: dict[str, Any]) -> None:
    """Train as one of the workers that Ray Train placed.

    Args:
        settings: `config` (the frozen YAML) and `run_folder`.

    Raises:
        WorkerError: whatever went wrong here.
    """
    import ray.train

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    try:
        run_folder = Path(settings["run_folder"])
        _enter(run_folder, rank)
        # All that takes long to import, before the wait for the data and not behind it.
        from transformers import AutoModelForCausalLM  # noqa: F401 - lazy up to this name

        from posttrain_dist.config import RunConfig
        from posttrain_dist.dist import Process
        from posttrain_dist.train import train

        address, port = _meet(run_folder, rank, world)
        process = Process(
            rank=rank,
            world=world,
            local_rank=context.get_local_rank(),
            master_address=address,
            master_port=port,
        )
        train(RunConfig.from_yaml(settings["config"]), run_folder, process)
    except BaseException as failure:
        trace = traceback.format_exc()
        print(trace, file=sys.stderr, flush=True)
        first_line = (str(failure).splitlines() or [""])[0]
        text = f"{type(failure).__name__}: {first_line}"
        error = failure if isinstance(failure, PosttrainError) else None
        raise WorkerError(rank, text, trace, error) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _meet(run_folder: Path, rank: int, world: int) -> tuple[str, int]:
    """Wait until the data is prepared; where rank 0 will listen for the others."""
    if rank == 0:
        wait_for_data(run_folder)
    if world == 1:
        return "127.0.0.1", 0
    from ray.train.collective import broadcast_from_rank_zero
    from ray.util import get_node_ip_address

    place = None
    if rank == 0:  # looked for this late, so that the port is still free when it is bound
        with socket.socket() as probe:
            probe.bind(("", 0))
            place = get_node_ip_address(), probe.getsockname()[1]
    address, port = broadcast_from_rank_zero(place)
    return address, port


def _enter(run_folder: Path, rank: int) -> None:
    """Make the run folder the working directory and its log the target of all output."""
    if not run_folder.is_dir():
        raise ClusterError(
            f"the node {socket.gethostname()} does not see the run folder",
            where=str(run_folder),
            fix="set output_root to a folder that all nodes share",
        )
    os.chdir(run_folder)
    log = os.open(
        run_folder / "logs" / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor in (1, 2):  # the descriptors, so that libraries in C and C++ land there too
        os.dup2(log, descriptor)
    os.close(log)
    # Ray may have given this process streams of its own; ours write to the descriptors above.
    sys.stdout, sys.stderr = (
        unfailing(os.fdopen(descriptor, "w", buffering=1, closefd=False, encoding="utf-8"))
        for descriptor in (1, 2)
    )
