"""Cross-entropy of ready logits, with the same options and results as the fused head."""

from __future__ import annotations

from typing import Any

import torch

from posttrain_kernels.losses.arguments import (
    check_channel,
    check_logits,
    check_options,
    check_rows,
    prepare_inputs,
)
from posttrain_kernels.losses.reference import transform_logits, weighted_loss
from posttrain_kernels.losses.results import HeadLoss, make_head_loss, total_loss
from posttrain_kernels.passes.dispatch import get_kernels, select_impl
from posttrain_kernels.passes.targets import (
    Kernels,
    LogitTransform,
    Statistics,
    Targets,
    statistics_dtype,
)


def cross_entropy(
    logits_TV: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    supervised: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    channel: torch.Tensor | None = None,
    num_channels: int = 0,
    denominator: float | torch.Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    entropy: bool = False,
    impl: str = "auto",
) -> HeadLoss:
    """Weighted cross-entropy of raw logits; it adds the memory of one copy of supervised rows.

    The reference and every option are those of `linear_cross_entropy`, from `logits_NV` on. Where
    the head is at hand, use that: it never holds all logits.

    Args:
        logits_TV: [T, V] in float32, bfloat16, float16 or float64; left as they are.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    check_logits(logits_TV)
    check_rows(len(logits_TV), logits_TV.shape[1], labels_N, supervised, token_weight)
    check_channel(channel, labels_N, num_channels)
    check_options(softcap, logit_scale, z_loss)
    dtype = statistics_dtype(logits_TV.dtype)
    transform = LogitTransform(softcap, logit_scale, z_loss)
    inputs = prepare_inputs(labels_N, supervised, token_weight, denominator, transform, dtype)
    chosen = select_impl(impl, logits_TV.device)
    if chosen == "reference":
        rows_N = inputs.hidden_rows
        rows_NV = logits_TV if rows_N is None else logits_TV.index_select(0, rows_N)
        logits_NV = transform_logits(rows_NV, transform)
        loss, stats = weighted_loss(logits_NV, inputs.targets, inputs.scale, entropy)
    else:
        # Read here: inside a Function's forward grad mode is always off.
        enabled = torch.is_grad_enabled() and logits_TV.requires_grad
        loss, *columns = _LogitsLoss.apply(  # type: ignore[no-untyped-call]
            logits_TV,
            inputs.hidden_rows,
            inputs.targets,
            inputs.scale,
            entropy,
            get_kernels(chosen),
            enabled,
        )
        stats = Statistics(*columns)
    return make_head_loss(loss, stats, inputs, channel, num_channels)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        supervised_N: torch.Tensor | None,
        targets: Targets,
        scale: torch.Tensor,
        entropy: bool,
        kernels: Kernels,
        gradient: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        if supervised_N is None:
            used_NV = logits_TV.clone(memory_format=torch.contiguous_format)
        else:
            used_NV = kernels.gather(logits_TV, supervised_N)
        # Float16 holds p - onehot, but not divided by a denominator: that is done in backward.
        ctx.divide_in_backward = used_NV.dtype == torch.float16
        scaled = targets if ctx.divide_in_backward else targets.scaled(scale)
        stats = Statistics.empty(len(used_NV), used_NV, entropy=entropy)
        kernels.row_pass(used_NV, scaled, stats, gradient)
        ctx.num_rows, ctx.scatter = len(logits_TV), kernels.scatter
        ctx.save_for_backward(used_NV, supervised_N, scale)
        ctx.mark_non_differentiable(*(column for column in stats if column is not None))
        return total_loss(stats, targets, scale), *stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grad_NV, supervised_N, scale = ctx.saved_tensors
        if grad_NV.dtype == torch.float64:  # of gradcheck, which goes backward more than once
            grad_NV = grad_NV.clone()
        factor = grad_loss * scale if ctx.divide_in_backward else grad_loss
        if supervised_N is None:
            return grad_NV.mul_(factor), *(None,) * 6
        return ctx.scatter(grad_NV, supervised_N, ctx.num_rows, factor), *(None,) * 6
