"""A short sum over all nodes, one process each: whether they can be joined, and how fast."""

from __future__ import annotations

import datetime
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_MIB = 1 << 20
_CPU_BYTES, _GPU_BYTES = 8 * _MIB, 256 * _MIB
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """Bus bandwidth in 10^9 bytes/s, or what went wrong."""

    gb_s: float | None = None
    error: str | None = None


def open_store(address: str, num_nodes: int, timeout_s: float) -> tuple[Store, int]:
    """Where the processes find each other; of the first one. And its port, for the others."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    wait = datetime.timedelta(seconds=timeout_s)
    store = TCPStore(address, 0, num_nodes, is_master=True, timeout=wait, wait_for_workers=False)
    return store, store.port


def join_store(address: str, port: int, num_nodes: int, timeout_s: float) -> Store:
    """The store of the first process, for the others."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    wait = datetime.timedelta(seconds=timeout_s)
    store: Store = TCPStore(address, port, num_nodes, is_master=False, timeout=wait)
    return store


def measure(store: Store, rank: int, num_nodes: int, *, on_gpu: bool, timeout_s: float) -> Outcome:
    """Sum over all processes; returns in time, whatever the network does.

    Bus bandwidth is 2 (n - 1) / n times bytes over seconds: what a ring sends over each link.
    """
    found: list[Outcome] = []

    def work() -> None:
        try:
            found.append(_measure(store, rank, num_nodes, on_gpu=on_gpu, timeout_s=timeout_s))
        except Exception as error:
            first = str(error).strip().splitlines() or [type(error).__name__]
            found.append(Outcome(error=first[0][:300]))

    # NCCL may hang where nothing can interrupt it: the thread is left behind.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else Outcome(error=f"no answer in {timeout_s:.0f} s")


def _measure(store: Store, rank: int, num_nodes: int, *, on_gpu: bool, timeout_s: float) -> Outcome:
    import torch
    from torch import distributed

    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=num_nodes,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    num_bytes = _GPU_BYTES if on_gpu else _CPU_BYTES
    values = torch.empty(num_bytes // 4, device=device)
    seconds = []
    for _ in range(1 + _ROUNDS):  # the first one opens the connections
        values.fill_(rank + 1)
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        distributed.all_reduce(values)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        low, high = float(values.min()), float(values.max())
        wanted = num_nodes * (num_nodes + 1) / 2
        if (low, high) != (wanted, wanted):
            return Outcome(error=f"sums are {low:g} to {high:g}, and must be {wanted:g}")
    share = 2 * (num_nodes - 1) / num_nodes
    return Outcome(gb_s=share * num_bytes / min(seconds[1:]) / 1e9)
