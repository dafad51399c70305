"""The losses of DPO's family, one line each: what two answers' log ratios are turned into.

With the log ratio r = log p(answer) - log p_ref(answer) of the better (w) and worse (l) answer,
n tokens long, d = r_w - r_l, e the label smoothing, m the row's margin:

    sigmoid       -(1 - e) log s(beta d - m) - e log s(-(beta d - m))   DPO, arXiv:2305.18290;
                                                 e > 0: conservative DPO, Mitchell 2023
    hinge         max(0, 1 - (beta d - m))                              SLiC, arXiv:2305.10425
    ipo           (r_w / n_w - r_l / n_l - 1 / (2 beta))^2              IPO, arXiv:2310.12036
    robust        ((1 - e) -log s(x) + e log s(-x)) / (1 - 2 e), x = beta d - m
                                                                        rDPO, arXiv:2403.00409
    sigmoid_norm  -log s(beta (r_w / n_w - r_l / n_l) - m)              Tulu 3, arXiv:2411.15124
    exo_pair      KL of (s(beta d), s(-beta d)) from (1 - e, e)         EXO, arXiv:2402.00856
    sppo_hard     (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2       SPPO, arXiv:2405.00675
    apo_zero      1 - s(beta r_w) + s(beta r_l)                         APO, arXiv:2408.06266
    apo_down      s(beta r_w) + 1 - s(beta d)                           ... equation 8

The margin of a row is subtracted from the reward margin (Llama 2, arXiv:2307.09288; ODPO,
arXiv:2402.10571). An f-divergence other than the reverse KL takes the place of r (f-DPO,
arXiv:2309.16240), with u = p / p_ref = exp(r):

    f'(u)         reverse_kl r;  forward_kl 1 - 1 / u;  js log(2 u / (1 + u));
                  alpha (1 - u^-alpha) / alpha
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from posttrain_dist.objectives.preference.loss_types import Divergence, LossType


class PairScores(NamedTuple):
    """The two answers of each comparison, float64 [P]; their scores are f'(u), or r."""

    better: torch.Tensor
    worse: torch.Tensor
    better_mean: torch.Tensor  # per token
    worse_mean: torch.Tensor
    margin: torch.Tensor

    def logit(self, beta: float) -> torch.Tensor:
        """beta d - m."""
        return beta * (self.better - self.worse) - self.margin

    @property
    def mean_difference(self) -> torch.Tensor:
        """The difference of the means per token."""
        return self.better_mean - self.worse_mean


def score(logratio: torch.Tensor, divergence: Divergence, alpha: float) -> torch.Tensor:
    """f'(exp(logratio)), up to a constant that gives 0 at 0."""
    if divergence is Divergence.forward_kl:
        return -torch.expm1(-logratio)
    if divergence is Divergence.js:
        return math.log(2) + logsigmoid(logratio)
    if divergence is Divergence.alpha:
        return -torch.expm1(-alpha * logratio) / alpha
    return logratio


def _smoothed(logit: torch.Tensor, smoothing: float) -> torch.Tensor:
    return -(1 - smoothing) * logsigmoid(logit) - smoothing * logsigmoid(-logit)


def _sigmoid(pair: PairScores, beta: float, smoothing: float) -> torch.Tensor:
    return _smoothed(pair.logit(beta), smoothing)


def _hinge(pair: PairScores, beta: float, smoothing: float) -> torch.Tensor:
    return torch.relu(1 - pair.logit(beta))


def _ipo(pair: PairScores, beta: float, smoothing: float) -> torch.Tensor:
    return (pair.mean_difference - 1 / (2 * beta)) ** 2


def _robust(pair: PairScores, beta: float, smoothing: float) -> torch.Tensor:
    logit = pair.logit(beta)
    loss = -(1 - smoothing) * logsigmoid(logit) + smoothing * logsigmoid(-logit)
    return loss / (1 - 2 * smoothing)


def _sigmoid_norm(pair: PairScores, beta: float, smoothing: float) -> torch.Tensor:
    return _smoothed(beta * pair.mean_difference - pair.margin, smoothing)


def _exo_pair(pair: PairScores, beta: float, smoothing: float) -> torch.Tensor:
    logit = pair.logit(beta)
    better = torch.sigmoid(logit) * (logsigmoid(logit) - math.log1p(-smoothing))
    return better + torch.sigmoid(-logit) * (logsigmoid(-logit) - math.log(smoothing))


def _sppo_hard(pair: PairScores, beta: float, smoothing: float) -> torch.Tensor:
    half = 1 / (2 * beta)
    return (pair.better - half) ** 2 + (pair.worse + half) ** 2


def _apo_zero(pair: PairScores, beta: float, smoothing: float) -> torch.Tensor:
    return torch.sigmoid(-beta * pair.better) + torch.sigmoid(beta * pair.worse)


def _apo_down(pair: PairScores, beta: float, smoothing: float) -> torch.Tensor:
    return torch.sigmoid(beta * pair.better) + torch.sigmoid(-pair.logit(beta))


# (scores, beta, label smoothing) -> the loss of each comparison.
PAIR_LOSSES: dict[LossType, Callable[[PairScores, float, float], torch.Tensor]] = {
    LossType.sigmoid: _sigmoid,
    LossType.hinge: _hinge,
    LossType.ipo: _ipo,
    LossType.robust: _robust,
    LossType.sigmoid_norm: _sigmoid_norm,
    LossType.exo_pair: _exo_pair,
    LossType.sppo_hard: _sppo_hard,
    LossType.apo_zero: _apo_zero,
    LossType.apo_down: _apo_down,
}
