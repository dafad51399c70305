"""The specification: plain torch in float32, gradients by autograd."""

from __future__ import annotations

import torch
from torch import nn

from posttrain_kernels.losses.results import total_loss
from posttrain_kernels.passes.targets import (
    IGNORE_INDEX,
    LogitTransform,
    Statistics,
    Targets,
    statistics_dtype,
)


def reference_logits(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    supervised_N: torch.Tensor | None,
    transform: LogitTransform,
) -> torch.Tensor:
    """All transformed logits at once in float32 (float64 for float64 input): N x V x 4 bytes."""
    dtype = statistics_dtype(hidden_TD.dtype)
    used_ND = hidden_TD if supervised_N is None else hidden_TD.index_select(0, supervised_N)
    bias_V = None if bias_V is None else bias_V.to(dtype)
    logits_NV = nn.functional.linear(used_ND.to(dtype), weight_VD.to(dtype), bias_V)
    return transform_logits(logits_NV, transform)


def transform_logits(logits_NV: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    """Raw logits with their scale and softcap."""
    logits_NV = logits_NV.to(statistics_dtype(logits_NV.dtype)) * transform.logit_scale
    if transform.softcap is None:
        return logits_NV
    return transform.softcap * torch.tanh(logits_NV / transform.softcap)


def reference_statistics(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, *, entropy: bool
) -> Statistics:
    """Statistics of transformed logits, with gradient."""
    nll_N = nn.functional.cross_entropy(
        logits_NV, labels_N, reduction="none", ignore_index=IGNORE_INDEX
    )
    own_N = logits_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0]
    correct_N = (own_N == logits_NV.amax(dim=1)) & (labels_N != IGNORE_INDEX)
    log_p_NV = torch.log_softmax(logits_NV, dim=1)
    entropy_N = None
    if entropy:
        entropy_N = -torch.xlogy(log_p_NV.exp(), log_p_NV.exp()).sum(dim=1)
        entropy_N = entropy_N.masked_fill(labels_N == IGNORE_INDEX, 0)
    return Statistics(nll_N, logits_NV.logsumexp(dim=1), correct_N, entropy_N)


def reference_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    supervised_N: torch.Tensor | None,
    targets: Targets,
    scale: torch.Tensor,
    entropy: bool,
) -> tuple[torch.Tensor, Statistics]:
    """The loss with its gradient, and the statistics without."""
    if targets.shard is not None:
        raise ValueError("impl='reference' knows no shard; use impl='torch'")
    logits_NV = reference_logits(hidden_TD, weight_VD, bias_V, supervised_N, targets.transform)
    return weighted_loss(logits_NV, targets, scale, entropy)


def weighted_loss(
    logits_NV: torch.Tensor, targets: Targets, scale: torch.Tensor, entropy: bool
) -> tuple[torch.Tensor, Statistics]:
    """The same from transformed logits."""
    stats = reference_statistics(logits_NV, targets.labels_N, entropy=entropy)
    loss = total_loss(stats, targets, scale)
    return loss, Statistics(*(x if x is None else x.detach() for x in stats))  # type: ignore[arg-type]
