"""Fused operations of the training step; plain torch in and out, nothing of ours imported."""

from __future__ import annotations

from posttrain_kernels.losses.head import HeadLoss, linear_cross_entropy
from posttrain_kernels.losses.logits import cross_entropy
from posttrain_kernels.losses.logprob import LogProb, linear_logprob
from posttrain_kernels.passes.products import multiplies_fast
from posttrain_kernels.passes.vocab import VocabShard

__all__ = [
    "HeadLoss",
    "LogProb",
    "VocabShard",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_logprob",
    "multiplies_fast",
]
