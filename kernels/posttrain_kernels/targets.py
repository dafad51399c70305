"""What the implementations of the output head share: the targets and the form of their results.

Shape legend of this package, used in names:
    T  rows of hidden        N  supervised rows      B  rows of one chunk
    D  hidden size           V  vocabulary           C  channels
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class Targets:
    """Which rows of hidden are used, what each predicts, and how its logits are shaped."""

    labels_N: torch.Tensor  # int64
    weight_N: torch.Tensor  # in the dtype of the row statistics
    supervised_N: torch.Tensor | None  # int64 rows of hidden; None: all of them, in order
    scale: float  # 1 / denominator; 0 where nothing is supervised anywhere
    softcap: float | None
    logit_scale: float

    def select(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The rows of hidden that are used, [N, D]."""
        if self.supervised_N is None:
            return hidden_TD
        return hidden_TD.index_select(0, self.supervised_N)

    def total(self, nll_N: torch.Tensor) -> torch.Tensor:
        """The normalised loss, a scalar in the dtype of `nll_N`, summed in float64."""
        return ((nll_N * self.weight_N).sum(dtype=torch.float64) * self.scale).to(nll_N.dtype)


class Rows(NamedTuple):
    """What an implementation returns."""

    loss: torch.Tensor  # scalar with gradient, already multiplied by Targets.scale
    nll_N: torch.Tensor  # detached, unweighted
    correct_N: torch.Tensor  # bool: no logit is larger than the label's


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of row statistics and losses: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32
