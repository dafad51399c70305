"""Fused operations of the training step; plain torch in and out, nothing of ours imported."""

from __future__ import annotations

from posttrain_kernels.head import HeadLoss, linear_cross_entropy
from posttrain_kernels.logits import cross_entropy
from posttrain_kernels.logprob import LogProb, linear_logprob
from posttrain_kernels.products import multiplies_fast
from posttrain_kernels.vocab import VocabShard

__all__ = [
    "HeadLoss",
    "LogProb",
    "VocabShard",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_logprob",
    "multiplies_fast",
]
