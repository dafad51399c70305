"""One digest of a model's weights: what two processes compare after weights were sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def weight_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 (hex) over the names, dtypes, shapes and bytes of tensors, in whatever order.

    Each tensor is needed only until the next one is taken, so that they can be streamed.
    """
    import torch

    lines = []
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        content = hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().data)
        lines.append(f"{name} {values.dtype} {tuple(values.shape)} {content.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
