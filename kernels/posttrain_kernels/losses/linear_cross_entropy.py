"""The output head as one operation: projection, cross-entropy, and sums per channel.

Gradients are made in the forward; backward only multiplies them by its argument. So the weight is
read in the forward alone: under ZeRO-3 it is gathered once, and may be gone by backward.
"""

from __future__ import annotations

from typing import Any

import torch

from posttrain_kernels.losses.arguments import (
    cast_for_autocast,
    check_channel,
    check_head,
    check_options,
    check_rows,
    prepare_inputs,
)
from posttrain_kernels.losses.reference import reference_loss
from posttrain_kernels.losses.results import HeadLoss, make_head_loss, total_loss
from posttrain_kernels.passes.chunked import ChunkPlan, chunked_forward
from posttrain_kernels.passes.dispatch import get_kernels, select_impl
from posttrain_kernels.passes.targets import (
    Kernels,
    LogitTransform,
    Statistics,
    Targets,
    statistics_dtype,
)
from posttrain_kernels.passes.vocab_shard import VocabShard


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
        weight_VD: [V, D], same dtype as `hidden_TD`; where it requires no gradient, none is made.
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
    hidden_TD, weight_VD, bias = cast_for_autocast(hidden_TD, weight_VD, bias)
    vocabulary = len(weight_VD) if shard is None else shard.size
    check_head(hidden_TD, weight_VD, bias, shard)
    check_rows(len(hidden_TD), vocabulary, labels_N, supervised, token_weight)
    check_channel(channel, labels_N, num_channels)
    check_options(softcap, logit_scale, z_loss, chunk_rows)
    dtype = statistics_dtype(hidden_TD.dtype)
    transform = LogitTransform(softcap, logit_scale, z_loss)
    inputs = prepare_inputs(
        labels_N, supervised, token_weight, denominator, transform, dtype, shard
    )
    chosen = select_impl(impl, hidden_TD.device)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        if chosen == "reference":
            loss, stats = reference_loss(
                hidden_TD,
                weight_VD,
                bias,
                inputs.hidden_rows,
                inputs.targets,
                inputs.scale,
                entropy,
            )
        else:
            kernels = get_kernels(chosen)
            plan = ChunkPlan.for_inputs(
                hidden_TD, weight_VD, bias, kernels.row_pass, chunk_rows, entropy=entropy
            )
            loss, *columns = _LinearLoss.apply(  # type: ignore[no-untyped-call]
                hidden_TD,
                weight_VD,
                bias,
                inputs.hidden_rows,
                inputs.targets,
                inputs.scale,
                plan,
                kernels,
            )
            stats = Statistics(*columns)
    return make_head_loss(loss, stats, inputs, channel, num_channels)


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
        plan: ChunkPlan,
        kernels: Kernels,
    ) -> tuple[torch.Tensor | None, ...]:
        used_ND = hidden_TD if supervised_N is None else kernels.gather(hidden_TD, supervised_N)
        # In float16 a gradient divided by its denominator would vanish: divided in backward.
        ctx.divide_in_backward = hidden_TD.dtype == torch.float16
        scaled = targets if ctx.divide_in_backward else targets.scaled(scale)
        stats, gradients = chunked_forward(used_ND, weight_VD, bias_V, scaled, plan)
        ctx.num_rows, ctx.scatter, ctx.dtype = len(hidden_TD), kernels.scatter, hidden_TD.dtype
        # Saved through autograd, so that the hooks of activation checkpointing see them.
        ctx.save_for_backward(*gradients, supervised_N, scale)
        statistics = [column for column in stats if column is not None]
        ctx.mark_non_differentiable(*statistics)
        return total_loss(stats, targets, scale), *stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, supervised_N, scale = ctx.saved_tensors
        factor = grad_loss * scale if ctx.divide_in_backward else grad_loss
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
