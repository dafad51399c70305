"""Fused operations of the training step; plain torch in and out, nothing of ours imported.

losses/   the public functions and their autograd
    linear_cross_entropy.py  the output head: projection and cross-entropy in one operation
    cross_entropy.py         the same loss of ready logits
    linear_logprob.py        log-probability and entropy of each row through the head
    arguments.py             checks and preparation of their arguments
    results.py               normalised sum, columns of all rows, sums per channel
    reference.py             the specification: all logits at once, gradients by autograd
passes/   what they are made of; imports nothing of losses/
    vocab_shard.py           the vocabulary split over ranks
    targets.py               targets and statistics of rows; legend of the shapes in names
    matmuls.py               the three matrix products of the head
    torch_kernels.py         row pass, gather and scatter in torch
    triton_kernels.py        the same in Triton
    dispatch.py              which of the two runs
    chunked.py               chunk by chunk: logits, row pass, gradients
"""

from __future__ import annotations

from posttrain_kernels.losses.cross_entropy import cross_entropy
from posttrain_kernels.losses.linear_cross_entropy import linear_cross_entropy
from posttrain_kernels.losses.linear_logprob import LogProb, linear_logprob
from posttrain_kernels.losses.results import HeadLoss
from posttrain_kernels.passes.matmuls import multiplies_fast, product_speedup
from posttrain_kernels.passes.vocab_shard import VocabShard

__all__ = [
    "HeadLoss",
    "LogProb",
    "VocabShard",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_logprob",
    "multiplies_fast",
    "product_speedup",
]
