"""Weights that hold NaN or infinity are refused by name: nothing good comes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain_dist import dist
from posttrain_dist.errors import ModelError
from posttrain_dist.models.folder import file_of_tensor
from posttrain_dist.models.quantized.load_nf4 import packed_values

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
    # The extremes are NaN where any value is.
    extremes = {name: torch.stack(torch.aminmax(p.detach())).float() for name, p in looked_at}
    refuse_extremes(extremes, folder, num_tensors=len(named))


def refuse_extremes(extremes: dict[str, torch.Tensor], folder: Path, *, num_tensors: int) -> None:
    """Refuse tensors one of whose `extremes` is not finite; collective, as `refuse_nonfinite`."""
    pairs = list(extremes.values())
    if len({pair.device for pair in pairs}) > 1:  # some are offloaded
        pairs = [pair.cpu() for pair in pairs]
    # They travel to the host together.
    finite = torch.stack(pairs).isfinite().all(1).tolist() if pairs else []
    shares = dist.gather([name for name, ok in zip(extremes, finite, strict=True) if not ok])
    names = dist.from_main(lambda: list(dict.fromkeys(n for share in shares for n in share)))
    if not names:
        return
    file = file_of_tensor(folder, names[0])
    shown = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
    raise ModelError(
        f"{len(names)} of its {num_tensors} tensors hold NaN or infinity: {shown}",
        where=str(file),
        fix="get the weights again, or use those of an earlier checkpoint: the training that wrote "
        "these has diverged, or the file was damaged",
    )


def _share(parameter: Any) -> torch.Tensor | None:
    """What this rank has of a parameter: its part under ZeRO-3, the scales of a packed one."""
    share: torch.Tensor | None = packed_values(parameter)
    if share is not None or not hasattr(parameter, "ds_id"):
        return parameter if share is None else share
    # What fills up the part of the last ranks is memory that nobody has written to.
    part = parameter.ds_tensor.view(-1)
    return part[: max(0, int(parameter.ds_numel) - dist.rank() * part.numel())]  # type: ignore[no-any-return]
