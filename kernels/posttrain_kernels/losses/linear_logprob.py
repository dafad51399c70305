"""Per-token log-probabilities through the head, for objectives that weigh them themselves.

What a preference or policy objective multiplies each log-probability by is known in backward
only. So backward makes the logits of each chunk again: 8 N D V multiply-adds in all where the
weight is trained. Where it is not, each row's gradient is its own vector times its factor, and is
made in the forward: 4 N D V.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from posttrain_kernels.losses.arguments import (
    cast_for_autocast,
    check_head,
    check_options,
    check_rows,
    row_weights,
    select_labelled_rows,
)
from posttrain_kernels.losses.reference import reference_logits, reference_statistics
from posttrain_kernels.losses.results import scatter_to_rows
from posttrain_kernels.passes.chunked import ChunkPlan, chunked_forward
from posttrain_kernels.passes.dispatch import get_kernels, select_impl
from posttrain_kernels.passes.targets import Kernels, LogitTransform, Targets, statistics_dtype
from posttrain_kernels.passes.vocab_shard import VocabShard


class LogProb(NamedTuple):
    """Result of `linear_logprob`; a tuple, so that the hooks of ZeRO-3 see its tensors."""

    logprob_N: torch.Tensor  # float32, carries the gradient; 0 where the label is -100
    entropy_N: (
        torch.Tensor | None
    )  # float32, nats, carries the gradient; 0 as above; None without entropy=True
    correct_N: torch.Tensor  # bool: no other token exceeds the label


def linear_logprob(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    supervised: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    shard: VocabShard | None = None,
    impl: str = "auto",
    chunk_rows: int | None = None,
) -> LogProb:
    """log p[label] of each row of hidden @ weight.T, differentiable row by row.

    Reference:

        logits_NV = (hidden_TD[supervised] @ weight_VD.T + bias) * logit_scale
        logits_NV = softcap * tanh(logits_NV / softcap)
        log_p_NV = torch.log_softmax(logits_NV, dim=1)
        logprob_N = log_p_NV.gather(1, labels_N[:, None])[:, 0]
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(dim=1)

    Under ZeRO-3 call it in the forward of the head's own module, whose hooks bring the weight
    back for backward.

    Args:
        logit_scale: also 1 / temperature of a policy.
        entropy: also the entropy of each row, with its gradient.

        The others are those of `linear_cross_entropy`.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    hidden_TD, weight_VD, bias = cast_for_autocast(hidden_TD, weight_VD, bias)
    vocabulary = len(weight_VD) if shard is None else shard.size
    check_head(hidden_TD, weight_VD, bias, shard)
    check_rows(len(hidden_TD), vocabulary, labels_N, supervised)
    check_options(softcap, logit_scale, 0.0, chunk_rows)
    chosen = select_impl(impl, hidden_TD.device)
    transform = LogitTransform(softcap, logit_scale)
    label_rows, hidden_rows = select_labelled_rows(labels_N, supervised)
    labels_K = labels_N if label_rows is None else labels_N[label_rows]
    with torch.autocast(hidden_TD.device.type, enabled=False):
        if chosen == "reference":
            if shard is not None:
                raise ValueError("impl='reference' knows no shard; use impl='torch'")
            logits_NV = reference_logits(hidden_TD, weight_VD, bias, hidden_rows, transform)
            stats = reference_statistics(logits_NV, labels_K, entropy=entropy)
            nll_K, entropy_K, correct_K = stats.nll, stats.entropy, stats.correct
        else:
            weight_K = row_weights(labels_K, None, statistics_dtype(hidden_TD.dtype))
            targets = Targets(labels_K.contiguous(), weight_K, transform, shard=shard)
            kernels = get_kernels(chosen)
            hidden_KD = hidden_TD
            if hidden_rows is not None:
                hidden_KD = _Gather.apply(hidden_TD, hidden_rows, kernels)  # type: ignore[no-untyped-call]
            nll_K, entropy_K, correct_K = _row_losses(
                hidden_KD, weight_VD, bias, targets, kernels, entropy, chunk_rows
            )
    columns = (
        scatter_to_rows(c, label_rows, len(labels_N)) for c in (-nll_K, entropy_K, correct_K)
    )
    return LogProb(*columns)  # type: ignore[arg-type]


def _row_losses(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets: Targets,
    kernels: Kernels,
    entropy: bool,
    chunk_rows: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    plan = ChunkPlan.for_inputs(
        hidden_ND, weight_VD, bias_V, kernels.row_pass, chunk_rows, entropy=entropy
    )
    frozen = not (plan.weight or plan.bias or entropy)
    function = _FrozenHead if frozen else _RecomputedLogits
    return function.apply(hidden_ND, weight_VD, bias_V, targets, plan)  # type: ignore[no-untyped-call, no-any-return]


# --------------------------------------------------------------------------- autograd


class _Gather(torch.autograd.Function):
    """hidden_TD[rows_N]; backward adds up rows that were gathered more than once."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, rows_N: torch.Tensor, kernels: Kernels
    ) -> torch.Tensor:
        ctx.num_rows, ctx.scatter = len(hidden_TD), kernels.scatter
        ctx.save_for_backward(rows_N)
        return kernels.gather(hidden_TD, rows_N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows_N,) = ctx.saved_tensors
        one = grad_ND.new_ones((), dtype=statistics_dtype(grad_ND.dtype))
        return ctx.scatter(grad_ND.clone(), rows_N, ctx.num_rows, one), None, None


class _FrozenHead(torch.autograd.Function):
    """Only hidden has a gradient: d nll / d hidden of each row is made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets: Targets,
        plan: ChunkPlan,
    ) -> tuple[torch.Tensor | None, ...]:
        stats, gradients = chunked_forward(hidden_ND, weight_VD, bias_V, targets, plan)
        ctx.save_for_backward(gradients.hidden_ND)
        ctx.mark_non_differentiable(stats.correct)
        return stats.nll, None, stats.correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nll_N: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        (unit_ND,) = ctx.saved_tensors
        return (unit_ND * grad_nll_N[:, None]).to(unit_ND.dtype), *(None,) * 4


class _RecomputedLogits(torch.autograd.Function):
    """Backward makes the logits again, weighted by its arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets: Targets,
        plan: ChunkPlan,
    ) -> tuple[torch.Tensor | None, ...]:
        stats, _ = chunked_forward(hidden_ND, weight_VD, bias_V, targets, plan.without_gradients())
        ctx.targets, ctx.plan = targets, plan
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
        ctx.mark_non_differentiable(stats.correct)
        return stats.nll, stats.entropy, stats.correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_nll_N: torch.Tensor, grad_entropy_N: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V = ctx.saved_tensors
        labelled_N = ctx.targets.weight_N  # 1, and 0 where the label is -100
        weight_N = grad_nll_N * labelled_N
        if grad_entropy_N is not None:
            grad_entropy_N = grad_entropy_N * labelled_N
        scale: torch.Tensor | None = None
        if hidden_ND.dtype == torch.float16:  # small weights would vanish in its gradients
            scale = _max_abs(weight_N, grad_entropy_N)
            weight_N = weight_N / scale
            grad_entropy_N = None if grad_entropy_N is None else grad_entropy_N / scale
        targets = Targets(
            ctx.targets.labels_N,
            weight_N,
            ctx.targets.transform,
            grad_entropy_N,
            ctx.targets.shard,
        )
        _, gradients = chunked_forward(hidden_ND, weight_VD, bias_V, targets, ctx.plan)
        if scale is None:  # nothing is copied: that of the weight is as large as the weight
            return *gradients, None, None
        scaled = (None if g is None else (g * scale).to(hidden_ND.dtype) for g in gradients)
        return *scaled, None, None


def _max_abs(*weights: torch.Tensor | None) -> torch.Tensor:
    """The largest absolute value, 1 where all are 0: divided by it, none vanishes in float16."""
    given = [
        weight_N.abs().amax() for weight_N in weights if weight_N is not None and len(weight_N)
    ]
    if not given:
        return torch.ones(())
    largest = torch.stack(given).amax()
    return torch.where(largest > 0, largest, 1)
