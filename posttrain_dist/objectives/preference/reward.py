"""Reward models: a number for an answer, learned from comparisons or from scores. No torch on top.

bradley_terry   -log sigmoid(r_i - r_j - margin_i)       Bradley and Terry 1952; Ouyang et al.,
                                                         arXiv:2203.02155; margins: Touvron et al.,
                                                         arXiv:2307.09288, section 3.2.2
      + center  (r_i + r_j)^2                            Eisenstein et al., arXiv:2312.09244
regression      (r - score)^2                            Wang et al., arXiv:2406.08673
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from posttrain_dist.errors import Rule, at_least
from posttrain_dist.flow import Column, Extra, Loss
from posttrain_dist.objectives.base import Objective
from posttrain_dist.objectives.preference.pairwise import ANSWER_FIELDS, MAX_WEIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from posttrain_dist.flow import Batch
    from posttrain_dist.objectives.preference.compared_answers import Comparisons

NUM_BINS = 10  # of predicted probabilities, from 0.5 to 1
_OF_BIN = ("confidence", "right", "bin")  # sums over the comparisons of a bin, and their number


class RewardLoss(Enum):
    """What rewards are learned from."""

    bradley_terry = "bradley_terry"  # which of two answers is better
    regression = "regression"  # the score of an answer


class RewardCount(NamedTuple):
    """What the loss is divided by."""

    comparisons: float  # sum of their weights: 1 for each pair, and for each ranking
    answers: float


@dataclass(kw_only=True, slots=True)
class Reward(Objective):
    """A scalar head on an answer's last token.

    Reference, with r the rewards of answers, and comparisons (i, j, weight) of each unit:

        one = -F.logsigmoid(r[i] - r[j] - margin_S[i]) + center * (r[i] + r[j]) ** 2
        loss = sum(weight * one) / denominators.comparisons

    or, with the scores of answers:

        loss = sum((r - value) ** 2) / denominators.answers
    """

    loss_type: RewardLoss = RewardLoss.bradley_terry
    # Weight of the square of what two rewards sum to, such as 0.01, which keeps them around 0:
    # comparisons say nothing of where they lie.
    center: float = 0.0

    own_rows: ClassVar[bool] = True
    extra: ClassVar[tuple[Extra, ...]] = (*ANSWER_FIELDS, Extra("margin_S", by=ANSWER_FIELDS[0].by))
    columns: ClassVar[tuple[Column, ...]] = (
        Column("loss", per="weight"),
        Column("weight"),
        Column("accuracy", per="comparisons"),
        Column("margin", per="comparisons"),
        Column("chosen_reward", per="comparisons"),
        Column("rejected_reward", per="comparisons"),
        Column("comparisons"),
        *(Column(f"{part}_{k}", part=True) for k in range(NUM_BINS) for part in _OF_BIN),
    )

    @property
    def rows(self) -> str:  # type: ignore[override]
        """Pairs and rankings, or answers with scores."""
        return "scores" if self.loss_type is RewardLoss.regression else "pairs"

    def rules(self) -> list[Rule]:
        """Ranges, and what excludes each other."""
        return [
            at_least("objective.center", self.center, 0, MAX_WEIGHT),
            Rule(
                not (self.center and self.loss_type is RewardLoss.regression),
                "objective.center",
                f"is {self.center}, and scores say where rewards lie",
                "set objective.center=0, or objective.loss_type=bradley_terry",
            ),
        ]

    def count(self, batch: Batch) -> RewardCount:
        """Comparisons and answers; both known on the host."""
        from posttrain_dist.objectives.preference.compared_answers import comparisons_of

        weights = [each.weight for each in comparisons_of(batch)]
        return RewardCount(float(sum(weights)), float(len(_answers(batch))))

    def loss(
        self, hidden_ND: torch.Tensor, head: Any, batch: Batch, denominators: RewardCount
    ) -> Loss:
        """The mean over comparisons, or over answers; the table has comparisons in either case."""
        import torch
        from torch.nn.functional import logsigmoid

        from posttrain_dist.objectives.preference import compared_answers as shared

        pairs = shared.on_device(batch, shared.comparisons_of(batch))
        reward_S = shared.sample_sums(batch, head.reward(hidden_ND))  # an answer has one target
        r_i, r_j = reward_S[pairs.better_P], reward_S[pairs.worse_P]
        if self.loss_type is RewardLoss.regression:
            place_M = shared.host_tensor(_answers(batch), torch.int64, reward_S.device)
            loss_M = (reward_S - batch.extra["value_S"]).square()[place_M]
            weight_M, denominator = torch.ones_like(loss_M), denominators.answers
        else:
            place_M, weight_M = pairs.better_P, pairs.weight_P
            loss_M = self.center * (r_i + r_j).square() - logsigmoid(r_i - r_j - pairs.margin_P)
            denominator = denominators.comparisons
        table = shared.channel_table(
            batch,
            head.num_channels,
            self.columns,
            [
                (place_M, {"loss": loss_M * weight_M, "weight": weight_M}),
                (pairs.better_P, _columns(r_i.detach(), r_j.detach(), pairs)),
            ],
        )
        return Loss(shared.divided((loss_M * weight_M).sum(), denominator).float(), table)

    def derived(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The expected calibration error of held-out comparisons (Guo et al., arXiv:1706.04599).

        sigmoid(|r_i - r_j|) is how sure the model is; the error is the sum over bins of
        |share right - mean confidence| times the bin's share of the comparisons.
        """
        total = sums["comparisons"]
        if not total > 0:
            return {}
        apart = (abs(sums[f"right_{k}"] - sums[f"confidence_{k}"]) for k in range(NUM_BINS))
        return {"calibration_error": sum(apart) / total}

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Of each bin that has comparisons: their number, mean confidence and share right."""
        bins = []
        for k in range(NUM_BINS):
            if (count := sums[f"bin_{k}"]) > 0:
                means = {part: sums[f"{part}_{k}"] / count for part in ("confidence", "right")}
                bins.append({**means, "count": count})
        return {"calibration": bins} if bins else {}


def _answers(batch: Batch) -> list[int]:
    """The samples that are answers to their prompt."""
    return [sample for sample, role in enumerate(batch.host_S["role_S"]) if role == 0]


def _columns(r_i: torch.Tensor, r_j: torch.Tensor, pairs: Comparisons) -> dict[str, torch.Tensor]:
    """Each column's share in the table, of each comparison."""
    import torch

    margin_P = r_i - r_j
    right_P = (margin_P > 0).to(margin_P)
    confidence_P = torch.sigmoid(margin_P.abs())
    bin_P = ((confidence_P - 0.5) * (2 * NUM_BINS)).long().clamp(0, NUM_BINS - 1)
    values = {
        "accuracy": right_P,
        "margin": margin_P,
        "chosen_reward": r_i,
        "rejected_reward": r_j,
        "comparisons": torch.ones_like(margin_P),
    }
    for k in range(NUM_BINS):
        in_bin = (bin_P == k).to(margin_P)
        of_bin = (in_bin * confidence_P, in_bin * right_P, in_bin)
        values |= {f"{part}_{k}": value for part, value in zip(_OF_BIN, of_bin, strict=True)}
    return {name: value * pairs.weight_P for name, value in values.items()}
