"""The specification of the output head: plain torch in float32, gradients by autograd."""

from __future__ import annotations

import torch
from torch import nn

from posttrain_kernels.targets import Rows, Targets, statistics_dtype


def reference_rows(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets: Targets
) -> Rows:
    """All logits at once in float32 (float64 for float64 input); takes several N x V x 4 bytes."""
    dtype = statistics_dtype(hidden_TD.dtype)
    bias_V = None if bias_V is None else bias_V.to(dtype)
    logits_NV = nn.functional.linear(
        targets.select(hidden_TD).to(dtype), weight_VD.to(dtype), bias_V
    )
    logits_NV = logits_NV * targets.logit_scale
    if targets.softcap is not None:
        logits_NV = targets.softcap * torch.tanh(logits_NV / targets.softcap)
    nll_N = nn.functional.cross_entropy(logits_NV, targets.labels_N, reduction="none")
    own_N = logits_NV.gather(1, targets.labels_N[:, None])[:, 0]
    correct_N = own_N == logits_NV.amax(dim=1)
    return Rows(targets.total(nll_N), nll_N.detach(), correct_N)
