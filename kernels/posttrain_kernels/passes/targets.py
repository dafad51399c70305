"""What the implementations share: targets of rows, their statistics, signatures of kernels.

Shape legend of this package, used in names:
    T  rows of hidden        N  supervised rows      B  rows of one chunk
    D  hidden size           V  vocabulary           C  channels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from posttrain_kernels.passes.vocab_shard import VocabShard

IGNORE_INDEX = -100  # label of a row without loss, as in torch


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """How raw logits x become z: z = cap(logit_scale * x), cap(y) = softcap * tanh(y / softcap).

    The loss of a token is nll + z_loss * logsumexp(z)^2 (Chowdhery et al. 2022, section 5).
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0


class Statistics(NamedTuple):
    """Statistics of each row, detached; in float32, or float64 for float64 input."""

    nll: torch.Tensor  # -log p[label]; 0 where the label is IGNORE_INDEX
    logsumexp: torch.Tensor
    correct: torch.Tensor  # bool: no logit is larger than the label's
    entropy: torch.Tensor | None  # of p, in nats; None without entropy=True

    @staticmethod
    def empty(num_rows: int, like: torch.Tensor, *, entropy: bool) -> Statistics:
        """Unfilled, for rows of the dtype and device of `like`."""
        acc_dtype = statistics_dtype(like.dtype)

        def column(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(num_rows, dtype=dtype, device=like.device)

        optional = column(acc_dtype) if entropy else None
        return Statistics(column(acc_dtype), column(acc_dtype), column(torch.bool), optional)

    def rows(self, rows: slice) -> Statistics:
        """Views of some rows."""
        return Statistics(*(None if column is None else column[rows] for column in self))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Targets:
    """What each row predicts, and how much its loss and its entropy count in the gradient.

    Rows are in the dtype of the statistics. With `entropy_weight_N` the gradient includes
    that of entropy_weight * entropy.
    """

    labels_N: torch.Tensor  # int64; IGNORE_INDEX goes with weight 0
    weight_N: torch.Tensor
    transform: LogitTransform
    entropy_weight_N: torch.Tensor | None = None
    shard: VocabShard | None = None

    def rows(self, rows: slice) -> Targets:
        """Views of some rows."""
        entropy = None if self.entropy_weight_N is None else self.entropy_weight_N[rows]
        return Targets(
            self.labels_N[rows], self.weight_N[rows], self.transform, entropy, self.shard
        )

    def scaled(self, scale: torch.Tensor) -> Targets:
        """The same with each row's weight in the gradient multiplied by `scale`."""
        return replace(self, weight_N=self.weight_N * scale)


# Fills the statistics of a chunk from its logits_BV; with gradient=True it also turns logits_BV
# into d(sum(weight * loss) + sum(entropy_weight * entropy)) / d(raw logits), in place.
RowPass = Callable[[torch.Tensor, Targets, Statistics, bool], None]


class Kernels(NamedTuple):
    """One implementation of what is not a matrix product."""

    row_pass: RowPass
    # (values_TD, rows_N) -> [N, D]
    gather: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    # (values_ND, rows_N, T, factor) -> [T, D]: factor times the sum of the values of each row
    scatter: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], torch.Tensor]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of row statistics and losses: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32
