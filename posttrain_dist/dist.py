"""Processes: who am I, and sums over all of us. Works with one process and no process group."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Process:
    """One worker of a run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    master_address: str = "127.0.0.1"
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


def start(process: Process) -> bool:
    """Join the process group unless there is one; True when this call made it."""
    import torch

    if torch.distributed.is_initialized():
        return False
    port = process.master_port or _free_port()
    environment = {
        "RANK": process.rank,
        "WORLD_SIZE": process.world,
        "LOCAL_RANK": process.local_rank,
        "MASTER_ADDR": process.master_address,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(
        backend,
        init_method=f"tcp://{process.master_address}:{port}",
        rank=process.rank,
        world_size=process.world,
    )
    return True


def stop() -> None:
    """Leave the process group."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """This worker's number; 0 without a process group."""
    import torch

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, in place; any shape."""
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
