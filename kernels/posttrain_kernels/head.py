"""The output head as one operation: projection, cross-entropy, and sums per channel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from posttrain_kernels.chunked import chunked_rows
from posttrain_kernels.reference import reference_rows
from posttrain_kernels.targets import Rows, Targets, statistics_dtype

IMPLEMENTATIONS = ("auto", "torch", "reference")


class HeadLoss(NamedTuple):
    """Result of `linear_cross_entropy`; a tuple, so that the hooks of ZeRO-3 see its tensors."""

    loss: torch.Tensor  # float32 scalar, carries the gradient
    nll_N: torch.Tensor  # detached float32, unweighted
    channels_C4: torch.Tensor  # detached float32: loss sum, weight, correct, count
    correct_N: torch.Tensor  # bool: no other token exceeds the label


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    supervised: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    channel: torch.Tensor | None = None,
    num_channels: int = 0,
    denominator: float,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
    chunk_rows: int | None = None,
) -> HeadLoss:
    """Weighted cross-entropy of hidden @ weight.T, without keeping the logits.

    Reference:

        logits_NV = (hidden_TD[supervised] @ weight_VD.T + bias) * logit_scale
        logits_NV = softcap * tanh(logits_NV / softcap)
        nll_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
        loss = (nll_N * token_weight).sum() / denominator

    With no supervised row, or weights that are all 0, the loss is 0 and so are its gradients,
    whatever the denominator.

    Args:
        hidden_TD: [T, D] in float32, bfloat16 or float64.
        weight_VD: [V, D], same dtype as `hidden_TD`; with no gradient asked of it, none is made.
        labels_N: int64 [N], each in [0, V).
        supervised: int64 [N], the rows of `hidden_TD` that are used; None: all T.
        token_weight: float32 [N]; None: all 1.
        channel: int64 [N], each in [0, num_channels); None leaves the channel table zero.
        denominator: what the weighted sum is divided by, global over micro-batches and ranks.
        bias: [V], same dtype as `hidden_TD`.
        impl: "torch" (chunked, gradient made in the forward), "reference", or "auto".
        chunk_rows: rows whose logits are alive together in "torch"; None chooses.

    Returns:
        The loss, each token's loss, and per channel (weighted loss sum, weight, correct, count),
        where count is the number of tokens with weight > 0 and correct those of them whose label
        no other token exceeds. Sums are not divided by the denominator.

    Raises:
        ValueError: shapes, dtypes or options that do not go together; labels or channels out of
            range (seen on the CPU only: a GPU would have to wait).
    """
    if torch.is_autocast_enabled(hidden_TD.device.type):
        dtype = torch.get_autocast_dtype(hidden_TD.device.type)
        hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if token_weight is None:
        token_weight = torch.ones(labels_N.shape, device=hidden_TD.device)
    _check_form(hidden_TD, weight_VD, labels_N, supervised, token_weight, bias)
    _check_options(channel, labels_N, num_channels, denominator, softcap, impl, chunk_rows)
    if hidden_TD.device.type == "cpu":
        _check_range("labels_N", labels_N, len(weight_VD), "pass the supervised rows only")
        if supervised is not None:
            _check_range("supervised", supervised, len(hidden_TD), "it indexes hidden_TD")
        if channel is not None:
            _check_range("channel", channel, num_channels, "raise num_channels")
        if denominator == 0 and bool(token_weight.any()):
            raise ValueError("denominator is 0, but some token has a weight")

    weight_N = token_weight.detach().to(statistics_dtype(hidden_TD.dtype))
    scale = 1 / denominator if denominator else 0.0
    targets = Targets(labels_N, weight_N, supervised, scale, softcap, logit_scale)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        if impl == "reference":
            rows = reference_rows(hidden_TD, weight_VD, bias, targets)
        else:
            rows = chunked_rows(hidden_TD, weight_VD, bias, targets, chunk_rows)
    table_C4 = _channel_table(rows, weight_N, channel, num_channels)
    return HeadLoss(rows.loss, rows.nll_N, table_C4, rows.correct_N)


def _channel_table(
    rows: Rows, weight_N: torch.Tensor, channel: torch.Tensor | None, num_channels: int
) -> torch.Tensor:
    table_C4 = torch.zeros(num_channels, 4, dtype=torch.float64, device=weight_N.device)
    if channel is not None:
        counted_N = weight_N > 0
        loss_N = rows.nll_N * weight_N
        columns = (loss_N, weight_N, rows.correct_N & counted_N, counted_N)
        table_C4.index_add_(0, channel, torch.stack([c.double() for c in columns], dim=1))
    return table_C4.float()


def _check_form(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    supervised: torch.Tensor | None,
    token_weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            "hidden_TD and weight_VD must be [T, D] and [V, D], they are "
            f"{list(hidden_TD.shape)} and {list(weight_VD.shape)}"
        )
    if hidden_TD.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        # Gradients of logits, divided by the denominator, vanish in float16.
        raise ValueError(f"{hidden_TD.dtype} is not supported; use bfloat16 or float32")
    for name, tensor in (("weight_VD", weight_VD), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden_TD.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, hidden_TD is {hidden_TD.dtype}")
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias must be [{len(weight_VD)}], it is {list(bias.shape)}")
    num_rows = len(hidden_TD) if supervised is None else len(supervised)
    for name, tensor in (("labels_N", labels_N), ("token_weight", token_weight)):
        if tensor.shape != (num_rows,):
            raise ValueError(f"{name} must be [{num_rows}], it is {list(tensor.shape)}")
    for name, index in (("labels_N", labels_N), ("supervised", supervised)):
        if index is not None and index.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, it is {index.dtype}")


def _check_options(
    channel: torch.Tensor | None,
    labels_N: torch.Tensor,
    num_channels: int,
    denominator: float,
    softcap: float | None,
    impl: str,
    chunk_rows: int | None,
) -> None:
    if channel is not None and channel.shape != labels_N.shape:
        raise ValueError(f"channel must be {list(labels_N.shape)}, it is {list(channel.shape)}")
    if channel is not None and num_channels < 1:
        raise ValueError("channel is given, so num_channels must be at least 1")
    if not (math.isfinite(denominator) and denominator >= 0):
        raise ValueError(f"denominator must be 0 or more, it is {denominator}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0 or None, it is {softcap}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, it is {impl!r}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, it is {chunk_rows}")


def _check_range(name: str, index_N: torch.Tensor, end: int, fix: str) -> None:
    if index_N.numel() == 0:
        return
    low, high = int(index_N.min()), int(index_N.max())
    if low < 0 or high >= end:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} holds {wrong}, outside [0, {end}); {fix}")
