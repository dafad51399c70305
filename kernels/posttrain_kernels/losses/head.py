"""The output head as one operation: projection, cross-entropy, and sums per channel.

Gradients are made in the forward; backward only multiplies them by its argument. So the weight is
read in the forward alone: under ZeRO-3 it is gathered once, and may be gone by backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from posttrain_kernels.losses.channels import channel_table
from posttrain_kernels.losses.checks import (
    check_channel,
    check_denominator,
    check_head,
    check_rows,
    check_shape,
)
from posttrain_kernels.losses.reference import reference_loss
from posttrain_kernels.passes.choose import choose, kernels
from posttrain_kernels.passes.chunked import Plan, run
from posttrain_kernels.passes.targets import (
    IGNORED,
    Kernels,
    LogitShape,
    Statistics,
    Targets,
    statistics_dtype,
)
from posttrain_kernels.passes.vocab import VocabShard


class HeadLoss(NamedTuple):
    """Result of a cross-entropy; a tuple, so that the hooks of ZeRO-3 see its tensors."""

    loss: torch.Tensor  # float32 scalar, carries the gradient
    nll_N: torch.Tensor  # detached float32, unweighted; 0 where the label is -100
    channels_C4: torch.Tensor  # detached float32: loss sum, weight, correct, count
    correct_N: torch.Tensor  # bool: no other token exceeds the label
    entropy_N: torch.Tensor | None = None  # detached float32, nats; where it was asked for


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    supervised: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    channel: torch.Tensor | None = None,
    num_channels: int = 0,
    denominator: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    entropy: bool = False,
    shard: VocabShard | None = None,
    impl: str = "auto",
    chunk_rows: int | None = None,
) -> HeadLoss:
    """Weighted cross-entropy of hidden @ weight.T, without keeping the logits.

    Reference:

        logits_NV = (hidden_TD[supervised] @ weight_VD.T + bias) * logit_scale
        logits_NV = softcap * tanh(logits_NV / softcap)
        nll_N = F.cross_entropy(logits_NV, labels_N, reduction="none", ignore_index=-100)
        penalty_N = z_loss * logits_NV.logsumexp(dim=1) ** 2
        loss = ((nll_N + penalty_N) * token_weight).sum() / denominator

    With no supervised row, or weights that are all 0, the loss is 0 and so are its gradients,
    whatever the denominator. The same input gives the same bits, on a GPU too: nothing is added
    up by atomics (but for impl="torch" on a GPU with a row supervised twice).

    A loss may be sent backward once: the gradients that were made in the forward are handed out,
    not copied. A second time is an error of autograd.

    Args:
        hidden_TD: [T, D] in float32, bfloat16, float16 or float64.
        weight_VD: [V, D], same dtype as `hidden_TD`; with no gradient asked of it, none is made.
            May be any tensor of the graph: the embedding, or W + B @ A of a LoRA on the head.
        labels_N: int64 [N], each in [0, V), or -100 for no loss.
        supervised: int64 [N], the rows of `hidden_TD` that are used; None: all T. Rows that are
            left out cost nothing; rows labelled -100 cost nothing on a CPU only, for on a GPU the
            host would have to wait to learn how many they are.
        token_weight: [N], without gradient; None: all 1.
        channel: int64 [N], each in [0, num_channels); None leaves the channel table zero.
        denominator: what the weighted sum is divided by, global over micro-batches and ranks.
        bias: [V], same dtype as `hidden_TD`.
        z_loss: weight of the squared logsumexp (Chowdhery et al. 2022, section 5). It is part of
            the loss, not of `nll_N` nor of the channel table.
        entropy: also find the entropy of each row's distribution, in the same pass; 0 where the
            label is -100.
        shard: this rank's part of the vocabulary, where the head is split over ranks. Collective.
        impl: "triton" (GPU), "torch" (chunked in plain torch), "reference" (all logits at once),
            or "auto": by the device.
        chunk_rows: rows whose logits are alive together; None chooses by device and vocabulary.

    Returns:
        The loss, each token's loss, and per channel (weighted loss sum, weight, correct, count),
        where count is the number of tokens with weight > 0 and correct those of them whose label
        no other token exceeds. Sums are not divided by the denominator.

    Raises:
        ValueError: shapes, dtypes or options that do not go together; labels, channels or rows
            out of range. On a GPU, where the host would have to wait to see them, these make the
            loss of their row, or the table, NaN, or stop the device; TRITON_DEBUG=1 makes labels
            a device assert. So does a denominator tensor that is 0 where some row has a weight.
    """
    hidden_TD, weight_VD, bias = under_autocast(hidden_TD, weight_VD, bias)
    vocabulary = len(weight_VD) if shard is None else shard.size
    check_head(hidden_TD, weight_VD, bias, shard)
    check_rows(len(hidden_TD), vocabulary, labels_N, supervised, token_weight)
    check_channel(channel, labels_N, num_channels)
    check_shape(softcap, logit_scale, z_loss, chunk_rows)
    dtype = statistics_dtype(hidden_TD.dtype)
    shape = LogitShape(softcap, logit_scale, z_loss)
    used = in_use(labels_N, supervised, token_weight, denominator, shape, dtype, shard)
    chosen = choose(impl, hidden_TD.device)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        if chosen == "reference":
            loss, found = reference_loss(
                hidden_TD, weight_VD, bias, used.supervised, used.targets, used.scale, entropy
            )
        else:
            # Asked here: inside a Function's forward grad mode is always off.
            enabled = torch.is_grad_enabled()
            parts = kernels(chosen)
            plan = Plan(
                parts.row_pass,
                chunk_rows,
                hidden=enabled and hidden_TD.requires_grad,
                weight=enabled and weight_VD.requires_grad,
                bias=enabled and bias is not None and bias.requires_grad,
                entropy=entropy,
            )
            loss, *columns = _LinearLoss.apply(  # type: ignore[no-untyped-call]
                hidden_TD, weight_VD, bias, used.supervised, used.targets, used.scale, plan, parts
            )
            found = Statistics(*columns)
    return head_loss(loss, found, used, channel, num_channels)


# --------------------------------------------------------------------------- rows


def under_autocast(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The projection's tensors in the dtype of autocast where that is on."""
    device = hidden_TD.device.type
    if not torch.is_autocast_enabled(device):
        return hidden_TD, weight_VD, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden_TD.to(dtype), weight_VD.to(dtype), None if bias is None else bias.to(dtype)


class InUse(NamedTuple):
    """The rows that have a label: on a CPU K of N, on a GPU all N."""

    targets: Targets  # of the K
    supervised: torch.Tensor | None  # int64 [K], rows of hidden; None: all, in order
    scale: torch.Tensor  # 1 / denominator
    weight_N: torch.Tensor  # 0 where there is no label
    places: torch.Tensor | None  # int64 [K], of the K among the N; None: all


def in_use(
    labels_N: torch.Tensor,
    supervised: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    denominator: float | torch.Tensor,
    shape: LogitShape,
    dtype: torch.dtype,
    shard: VocabShard | None = None,
) -> InUse:
    """The public arguments as the implementations take them; weights in `dtype`.

    Raises:
        ValueError: the denominator is no number of 0 or more, or 0 with a weight to divide.
    """
    weight_N = row_weights(labels_N, token_weight, dtype)
    check_denominator(denominator, weight_N)
    places, supervised_K = labelled(labels_N, supervised)
    labels_K, weight_K = (x if places is None else x[places] for x in (labels_N, weight_N))
    targets = Targets(labels_K.contiguous(), weight_K.contiguous(), shape, shard=shard)
    return InUse(targets, supervised_K, inverse(denominator, weight_N), weight_N, places)


def head_loss(
    loss: torch.Tensor,
    found: Statistics,
    used: InUse,
    channel: torch.Tensor | None,
    num_channels: int,
) -> HeadLoss:
    """The result for all N rows."""
    num_rows = len(used.weight_N)
    found = Statistics(*(spread(column, used.places, num_rows) for column in found))  # type: ignore[arg-type]
    table_C4 = channel_table(found, used.weight_N, channel, num_channels)
    return HeadLoss(loss, found.nll, table_C4, found.correct, found.entropy)


def row_weights(
    labels_N: torch.Tensor, token_weight: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The weight of each row in `dtype`, 0 where it has no label."""
    labelled_N = labels_N != IGNORED
    if token_weight is None:
        return labelled_N.to(dtype)
    return torch.where(labelled_N, token_weight.detach().to(dtype), 0)


def labelled(
    labels_N: torch.Tensor, supervised: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """On a CPU the rows that have a label, among N and among T; None: all of them."""
    if labels_N.device.type != "cpu" or not bool((labels_N == IGNORED).any()):
        return None, supervised
    used_N = (labels_N != IGNORED).nonzero()[:, 0]
    return used_N, used_N if supervised is None else supervised[used_N]


def spread(
    column: torch.Tensor | None, places: torch.Tensor | None, num_rows: int
) -> torch.Tensor | None:
    """A value of each row in use -> of all N rows, 0 elsewhere; gradients pass."""
    if places is None or column is None:
        return column
    return column.new_zeros(num_rows).index_copy(0, places, column)


def inverse(denominator: float | torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
    """1 / denominator on the device, 0 where it is 0, in the dtype of `weight_N`."""
    if not isinstance(denominator, torch.Tensor):
        return weight_N.new_full((), 1 / denominator if denominator else 0.0)
    # Divided in the dtype of the argument, which may be wider.
    whole = denominator.detach().reshape(())
    # Nobody waits to look at it: 0 with a weight to divide gives no number.
    nothing = torch.where(weight_N.any(), torch.nan, 0.0)
    return torch.where(whole == 0, nothing, 1 / whole).to(weight_N)


def total_loss(found: Statistics, targets: Targets, scale: torch.Tensor) -> torch.Tensor:
    """The normalised loss, a scalar in the dtype of the statistics, summed in float64."""
    loss_N = found.nll
    if targets.shape.z_loss:
        loss_N = loss_N + targets.shape.z_loss * found.logsumexp.square()
    return ((loss_N * targets.weight_N).sum(dtype=torch.float64) * scale).to(loss_N.dtype)


# --------------------------------------------------------------------------- autograd


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        supervised_N: torch.Tensor | None,
        targets: Targets,
        scale: torch.Tensor,
        plan: Plan,
        parts: Kernels,
    ) -> tuple[torch.Tensor | None, ...]:
        used_ND = hidden_TD if supervised_N is None else parts.gather(hidden_TD, supervised_N)
        # In float16 a gradient divided by its denominator would vanish: divided in backward.
        ctx.late = hidden_TD.dtype == torch.float16
        scaled = targets if ctx.late else targets.scaled(scale)
        found, gradients = run(used_ND, weight_VD, bias_V, scaled, plan)
        ctx.num_rows, ctx.scatter, ctx.dtype = len(hidden_TD), parts.scatter, hidden_TD.dtype
        # Saved through autograd, so that the hooks of activation checkpointing see them.
        ctx.save_for_backward(*gradients, supervised_N, scale)
        statistics = [column for column in found if column is not None]
        ctx.mark_non_differentiable(*statistics)
        return total_loss(found, targets, scale), *found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, supervised_N, scale = ctx.saved_tensors
        factor = grad_loss * scale if ctx.late else grad_loss
        if ctx.dtype == torch.float64:  # of gradcheck, which goes backward more than once
            copies = (None if g is None else g.clone() for g in (hidden_ND, weight_VD, bias_V))
            hidden_ND, weight_VD, bias_V = copies
        # In place: these gradients are nobody else's, and one of them is as large as the weight.
        if hidden_ND is not None and supervised_N is not None:
            hidden_ND = ctx.scatter(hidden_ND, supervised_N, ctx.num_rows, factor)
        elif hidden_ND is not None:
            hidden_ND.mul_(factor)
        if weight_VD is not None:
            weight_VD = weight_VD.mul_(factor).to(ctx.dtype)
        if bias_V is not None:
            bias_V = bias_V.mul_(factor).to(ctx.dtype)
        return hidden_ND, weight_VD, bias_V, *(None,) * 5
