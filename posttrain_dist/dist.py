"""Processes: who am I, and sums over all of us. Works with one process and no process group."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
TIMEOUT = timedelta(minutes=30)  # for a rank that waits while another writes a large export

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Process:
    """One worker of a run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    master_address: str = LOOPBACK
    master_port: int = 0  # 0: any free port; right only with world 1

    @property
    def is_main(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0


def device(process: Process) -> torch.device:
    """The device that this worker computes on."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(process.local_rank)
        return torch.device("cuda", process.local_rank)
    return torch.device("cpu")


def start(process: Process) -> None:
    """Join the process group unless there is one; it stays until the process ends.

    DeepSpeed keeps the group that it first saw, so that a second one would not serve it.
    """
    import torch

    if torch.distributed.is_initialized():
        return
    port = process.master_port or _free_port()
    environment = {
        "RANK": process.rank,
        "WORLD_SIZE": process.world,
        "LOCAL_RANK": process.local_rank,
        "MASTER_ADDR": process.master_address,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    # Numbers of the host go by gloo, so that reading them waits for no device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    on_loopback = process.master_address == LOOPBACK
    if on_loopback and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        backend,
        store=_loopback_store(process, port) if on_loopback else None,
        init_method=None if on_loopback else f"tcp://{process.master_address}:{port}",
        rank=process.rank,
        world_size=process.world,
        timeout=TIMEOUT,
    )
    atexit.register(stop)


def _loopback_store(process: Process, port: int) -> torch._C._distributed_c10d.Store:
    """Where ranks of one machine meet; torch by itself would listen on all interfaces."""
    from torch._C._distributed_c10d import TCPStore

    if not process.is_main:
        return TCPStore(LOOPBACK, port, process.world, is_master=False, timeout=TIMEOUT)
    listener = socket.create_server((LOOPBACK, port), backlog=process.world + 16)
    return TCPStore(
        LOOPBACK,
        port,
        process.world,
        is_master=True,
        timeout=TIMEOUT,
        master_listen_fd=listener.detach(),
    )


def stop() -> None:
    """Leave the process group."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """This worker's number; 0 without a process group."""
    import torch

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world() -> int:
    """How many workers there are; 1 without a process group."""
    import torch

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, in place; any shape, on the CPU or the rank's GPU."""
    import torch

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def all_max(tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum of `tensor` over all ranks, in place."""
    import torch

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor


def barrier() -> None:
    """Wait for all ranks."""
    import torch

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone; gloo has no type for it."""
    import torch

    if isinstance(error, ConnectionError | torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo/" in str(error)


def on_all(work: Callable[[], T]) -> T:
    """Run `work` on every rank; if it fails on one, every rank raises, so that none waits.

    Raises:
        PosttrainError: as it was on the ranks that failed.
        RuntimeError: on the others.
    """
    import torch

    failure: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    failed = torch.tensor([float(failure is not None)])
    ranks = int(all_sum(failed).item())
    if failure is not None:
        raise failure
    if ranks:
        raise RuntimeError(f"{ranks} of the other ranks failed; their logs say why")
    return result  # type: ignore[return-value]


def on_main(work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0 alone while the others wait; its failure is everyone's."""
    return on_all(lambda: work() if rank() == 0 else None)


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank: one look at a shared disk, one answer."""
    import torch

    made = on_main(make)
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return made  # type: ignore[return-value]
    box = [made]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """The `value` of every rank, in the order of ranks, on rank 0; an empty list on the others."""
    import torch

    if world() == 1:
        return [value]
    values: list[T] = [value] * world() if rank() == 0 else []
    torch.distributed.gather_object(value, values or None, dst=0)
    return values


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
