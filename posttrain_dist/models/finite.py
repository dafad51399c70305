"""Weights that hold NaN or infinity are refused by name: nothing good comes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain_dist import dist
from posttrain_dist.errors import ModelError
from posttrain_dist.models.folder import file_of_tensor

MAX_NAMES = 3  # that a message holds


def refuse_nonfinite(model: nn.Module, folder: Path, prefix: str = "") -> None:
    """Look at every parameter once, where it is; collective: each rank looks at its share.

    Args:
        folder: that the weights come from.
        prefix: of the names of `model`, which the files do not have.

    Raises:
        ModelError: with the names and the file, on all ranks.
    """
    named = [(name.removeprefix(prefix), _share(p)) for name, p in model.named_parameters()]
    looked_at = [(n, p) for n, p in named if p is not None and p.numel() and p.is_floating_point()]
    # The extremes are NaN where any value is; they travel to the host together.
    extremes = [torch.stack(torch.aminmax(p.detach())).float() for _, p in looked_at]
    if len({pair.device for pair in extremes}) > 1:  # some are offloaded
        extremes = [pair.cpu() for pair in extremes]
    finite = torch.stack(extremes).isfinite().all(1).tolist() if extremes else []
    found = [name for (name, _), ok in zip(looked_at, finite, strict=True) if not ok]
    shares = dist.gather(found)
    names = dist.from_main(lambda: list(dict.fromkeys(n for share in shares for n in share)))
    if not names:
        return
    file = file_of_tensor(folder, names[0])
    shown = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
    raise ModelError(
        f"{len(names)} of its {len(named)} tensors hold NaN or infinity: {shown}",
        where=str(file),
        fix="get the weights again, or use those of an earlier checkpoint: the training that wrote "
        "these has diverged, or the file was damaged",
    )


def _share(parameter: Any) -> torch.Tensor | None:
    """What this rank holds of a parameter: under ZeRO-3 its part of it."""
    share: torch.Tensor | None = getattr(parameter, "ds_tensor", parameter)
    return share
