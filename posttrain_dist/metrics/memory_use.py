"""Memory that a worker uses."""

from __future__ import annotations

from pathlib import Path

import torch

from posttrain_dist import dist


def memory_bytes(device: torch.device) -> int:
    """The largest over all ranks: peak allocation of a GPU, else private memory now.

    Private (anonymous) memory leaves out mapped model files, which all ranks share.
    """
    if device.type == "cuda":
        here = torch.cuda.max_memory_allocated(device)
    else:
        here = private_bytes()
    return int(dist.all_max(torch.tensor([float(here)], dtype=torch.float64, device=device))[0])


def private_bytes() -> int:
    """Anonymous resident memory of this process now; 0 where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
