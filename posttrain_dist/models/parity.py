"""Before the first step: the chosen head beside the reference, on tokens that will be trained.

A kernel that is wrong on this GPU, this vocabulary or this dtype gives plausible losses for hours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Batch

MAX_ROWS = 256  # supervised rows that are compared: the reference holds all their logits
# Largest difference of each, relative: by rounding alone, with room.
TOLERANCE = {
    torch.float32: {"loss": 1e-5, "nll": 1e-4, "grad_hidden": 1e-4, "grad_weight": 1e-4},
    torch.bfloat16: {"loss": 1e-2, "nll": 3e-2, "grad_hidden": 3e-2, "grad_weight": 3e-2},
}


class Parity(NamedTuple):
    """How far two implementations are apart; a tuple, so that the hooks of ZeRO-3 see it."""

    loss: torch.Tensor  # relative to the reference
    nll: torch.Tensor  # the largest of a token, relative to the largest loss (at least 1)
    grad_hidden: torch.Tensor  # norm of the difference, relative to the norm
    grad_weight: torch.Tensor  # the same of the head's weight


def compare(
    function: Callable[..., Any],
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_N: torch.Tensor,
    **options: Any,
) -> Parity:
    """`function(..., impl="auto")` beside `impl="reference"`, with gradients of hidden and weight.

    Args:
        function: signature of `posttrain_kernels.linear_cross_entropy`.
    """
    tensors = (hidden_ND, weight_VD, bias_V)
    ours = _run(function, "auto", tensors, labels_N, options)
    try:
        reference = _run(function, "reference", tensors, labels_N, options)
    except torch.OutOfMemoryError:  # its logits and float32 weight: in the memory of the host
        moved = [None if tensor is None else tensor.cpu() for tensor in tensors]
        on_host = {k: v.cpu() if hasattr(v, "cpu") else v for k, v in options.items()}
        found = _run(function, "reference", moved, labels_N.cpu(), on_host)
        reference = [tensor.to(hidden_ND.device) for tensor in found]
    loss, nll_N, hidden, weight = zip(ours, reference, strict=True)
    padded = [torch.nn.functional.pad(each_N, (0, 1)) for each_N in nll_N]  # there may be no row
    return Parity(
        loss=_relative(*loss),
        nll=(padded[0] - padded[1]).abs().amax() / padded[1].amax().clamp(min=1),
        grad_hidden=_relative(*hidden),
        grad_weight=_relative(*weight),
    )


def check(found: Parity, dtype: torch.dtype) -> dict[str, float]:
    """The differences as numbers.

    Raises:
        ModelError: one of them is past its tolerance, or not a number.
    """
    values = {name: float(value) for name, value in found._asdict().items()}
    past = [
        f"{name} by {value:.1e} (tolerance {TOLERANCE[dtype][name]:.0e})"
        for name, value in values.items()
        if not value <= TOLERANCE[dtype][name]
    ]
    if past:
        raise ModelError(
            "the fused head differs from the reference on the first batch: " + ", ".join(past),
            where="the start-up check of the output head",
            fix="nothing was trained; report this with the GPU and the versions in run.json",
        )
    return values


def some_targets(batch: Batch) -> torch.Tensor:
    """Up to MAX_ROWS places among `batch.supervised_N`, spread over the real ones."""
    count = min(batch.num_targets, MAX_ROWS)
    places = torch.linspace(0, max(batch.num_targets - 1, 0), count).round().long()
    return places.to(batch.labels_N.device)


def _run(
    function: Callable[..., Any],
    impl: str,
    tensors: Any,
    labels_N: torch.Tensor,
    options: dict[str, Any],
) -> list[torch.Tensor]:
    """Loss, each token's loss, gradients of hidden and weight."""
    hidden_ND, weight_VD = (tensor.detach().requires_grad_() for tensor in tensors[:2])
    with torch.enable_grad():
        result = function(hidden_ND, weight_VD, labels_N, bias=tensors[2], impl=impl, **options)
        gradients = torch.autograd.grad(result.loss, (hidden_ND, weight_VD))
    return [result.loss.detach(), result.nll_N, *gradients]


def _relative(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|a - b| / |b|, and |a - b| where b is 0."""
    norm, wide = torch.linalg.vector_norm, torch.float32
    apart = norm(ours.to(reference.dtype) - reference, dtype=wide)
    size = norm(reference, dtype=wide)
    return torch.where(size > 0, apart / size, apart)
