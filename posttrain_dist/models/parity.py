"""Before the first step: the chosen head beside the reference, on tokens that will be trained.

A kernel that is wrong on this GPU, this vocabulary or this dtype gives plausible losses for hours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Batch

MAX_ROWS = 256  # supervised rows that are compared: the reference holds all their logits
# What is allowed beside twice the error of eager torch in the same dtype ...
TOLERANCE = {
    torch.float32: {"loss": 1e-5, "nll": 1e-4, "grad_hidden": 1e-4, "grad_weight": 1e-4},
    torch.bfloat16: {"loss": 1e-2, "nll": 3e-2, "grad_hidden": 3e-2, "grad_weight": 3e-2},
}
# ... and, divided by the square root of the rows: of few rows two roundings differ by chance.
CHANCE = {torch.float32: 0.0, torch.bfloat16: 0.5}
# Of these also what rounding the logits does to the loss: of memorised tokens that may be 1e-3, the
# difference of logits of 20.
RELATIVE_TO_LOSS = ("loss", "grad_hidden", "grad_weight")


class Distance(NamedTuple):
    """How far something is from the reference; a tuple, so that the hooks of ZeRO-3 see it."""

    loss: torch.Tensor  # relative to the reference
    nll: torch.Tensor  # the largest of a token, relative to the largest loss (at least 1)
    grad_hidden: torch.Tensor  # norm of the difference, relative to the norm
    grad_weight: torch.Tensor  # the same of the head's weight; 0 of a frozen one


class Parity(NamedTuple):
    """The fused head, and plain torch in the same dtype, which rounds its logits."""

    fused: Distance
    eager: Distance
    rounding: torch.Tensor  # of the loss when its logits are rounded in float32, relative to it
    num_rows: int


def compare(
    function: Callable[..., Any],
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_N: torch.Tensor,
    *,
    trained: bool = True,
    **options: Any,
) -> Parity:
    """`function(..., impl="auto")` beside `impl="reference"`, with the gradients that are trained.

    Args:
        function: signature of `posttrain_kernels.linear_cross_entropy`.
        trained: whether the weight has a gradient; a frozen one goes another way through the
            kernel, and three gradients of its size are much memory beside a base in NF4.
        options: `token_weight`, `denominator`, `softcap`, `logit_scale`.
    """
    tensors = (hidden_ND, weight_VD, bias_V)
    run = partial(_run, trained=trained)
    rounding = _rounding(hidden_ND, weight_VD, bias_V, labels_N, **options)
    fused = run(function, tensors, labels_N, options)
    eager = run(_eager, tensors, labels_N, options)
    options["impl"] = "reference"
    try:
        reference = run(function, tensors, labels_N, options)
    except torch.OutOfMemoryError:  # its logits and float32 weight: in the memory of the host
        reference = []
    if not reference:  # not inside of `except`, which holds on to what was made
        moved = [None if tensor is None else tensor.cpu() for tensor in tensors]
        on_host = {k: v.cpu() if hasattr(v, "cpu") else v for k, v in options.items()}
        reference = run(function, moved, labels_N.cpu(), on_host)
        fused, eager = ([tensor.cpu() for tensor in each] for each in (fused, eager))
    loss = reference[0]
    rounding = rounding.to(loss.device)
    rounding = torch.where(loss > 0, rounding / loss, rounding)
    of_fused, of_eager = _distance(fused, reference), _distance(eager, reference)
    return Parity(of_fused, of_eager, rounding, len(labels_N))


def check(found: Parity, dtype: torch.dtype) -> dict[str, float]:
    """The differences of the fused head as numbers.

    Raises:
        ModelError: one of them is past its tolerance, or not a number.
    """
    values = {name: float(value) for name, value in found.fused._asdict().items()}
    chance = CHANCE[dtype] / max(found.num_rows, 1) ** 0.5
    allowed = {
        name: TOLERANCE[dtype][name] + chance + 2 * float(value)
        for name, value in found.eager._asdict().items()
    }
    for name in RELATIVE_TO_LOSS:
        allowed[name] += float(found.rounding)
    past = [
        f"{name} by {value:.1e} (tolerance {allowed[name]:.0e})"
        for name, value in values.items()
        if not value <= allowed[name]
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
    tensors: Any,
    labels_N: torch.Tensor,
    options: dict[str, Any],
    *,
    trained: bool,
) -> list[torch.Tensor]:
    """Loss, each token's loss, gradients of hidden and, where it is trained, of weight."""
    hidden_ND, weight_VD = (tensor.detach() for tensor in tensors[:2])
    wanted = [tensor.requires_grad_() for tensor in (hidden_ND, weight_VD)[: 1 + trained]]
    with torch.enable_grad():
        result = function(hidden_ND, weight_VD, labels_N, bias=tensors[2], **options)
        gradients = torch.autograd.grad(result.loss, wanted)
    return [result.loss.detach(), result.nll_N.detach(), *gradients]


class _Eager(NamedTuple):
    loss: torch.Tensor
    nll_N: torch.Tensor


def _eager(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    denominator: float,
    token_weight: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> _Eager:
    """Logits in the dtype of the input, as a model without a fused head has them."""
    logits_NV = nn.functional.linear(hidden_ND, weight_VD, bias).float() * logit_scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    nll_N = nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    weighted_N = nll_N if token_weight is None else nll_N * token_weight
    return _Eager(weighted_N.sum() / (denominator or 1.0), nll_N)


def _rounding(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_N: torch.Tensor,
    *,
    denominator: float,
    token_weight: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    **_: Any,
) -> torch.Tensor:
    """By how much the loss may differ when the labels' logits are summed in another order.

    loss = sum w (log sum exp(logits) - logit), and a logit sum_d h_d W_d rounds by up to
    eps sum_d |h_d W_d|; a gradient, of 1 - exp(-loss), differs by as much.
    """
    products_ND = hidden_ND.detach().float() * weight_VD.detach()[labels_N].float()
    size_N = products_ND.abs().sum(-1)
    if bias_V is not None:
        size_N = size_N + bias_V.detach()[labels_N].float().abs()
    if token_weight is not None:
        size_N = size_N * token_weight.abs()
    eps = torch.finfo(torch.float32).eps
    return size_N.sum() * abs(logit_scale) * eps / (denominator or 1.0)


def _distance(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> Distance:
    loss, nll_N, hidden, *weight = zip(ours, reference, strict=True)
    padded = [nn.functional.pad(each_N, (0, 1)) for each_N in nll_N]  # there may be no row
    return Distance(
        loss=_relative(*loss),
        nll=(padded[0] - padded[1]).abs().amax() / padded[1].amax().clamp(min=1),
        grad_hidden=_relative(*hidden),
        grad_weight=_relative(*weight[0]) if weight else torch.zeros_like(ours[0]),
    )


def _relative(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|a - b| / |b|, and |a - b| where b is 0."""
    norm, wide = torch.linalg.vector_norm, torch.float32
    apart = norm(ours.to(reference.dtype) - reference, dtype=wide)
    size = norm(reference, dtype=wide)
    return torch.where(size > 0, apart / size, apart)
