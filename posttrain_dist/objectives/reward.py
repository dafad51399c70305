"""Reward models: a number for an answer, learned from comparisons or from scores.

bradley_terry   - log sigmoid(r_i - r_j - margin)            Bradley and Terry 1952; Ouyang et al.,
                                                             arXiv:2203.02155; margins: Touvron et
                                                             al., arXiv:2307.09288, section 3.2.2
      + center  (r_i + r_j)^2                                Eisenstein et al., arXiv:2312.09244
regression      (r - score)^2                                Wang et al., arXiv:2406.08673
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from posttrain_dist.errors import Rule, at_least
from posttrain_dist.flow import By, Column, Extra, Loss
from posttrain_dist.objectives.base import Objective

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from posttrain_dist.flow import Batch

NUM_BINS = 10  # of predicted probabilities, from 0.5 to 1
_BINS = tuple(f"{part}_{k}" for k in range(NUM_BINS) for part in ("confidence", "right", "bin"))


class RewardLoss(Enum):
    """What rewards are learned from."""

    bradley_terry = "bradley_terry"  # which of two answers is better
    regression = "regression"  # the score of an answer


class RewardCount(NamedTuple):
    """What the loss is divided by."""

    compared: float  # prompts with answers that are compared: a ranking counts once
    answers: float


class Comparisons(NamedTuple):
    """Pairs of samples of one row, the better one first; letter: P pairs."""

    better: list[int]
    worse: list[int]
    weight: list[float]  # 1 / (pairs of their prompt)
    margin: list[float]


@dataclass(kw_only=True, slots=True)
class Reward(Objective):
    """A scalar head on an answer's last token.

    Reference, with r the rewards of one prompt's answers, and P its pairs (i, j) with value_i >
    value_j:

        loss = sum(-logsigmoid(r[i] - r[j] - margin[i]) + center * (r[i] + r[j]) ** 2) / len(P)

    and its mean over prompts; or (r - value) ** 2 and its mean over answers.
    """

    loss_type: RewardLoss = RewardLoss.bradley_terry
    # Weight of (r_i + r_j)^2, which keeps rewards around 0, such as 0.01; comparisons alone say
    # nothing of where they lie.
    center: float = 0.0

    own_rows: ClassVar[bool] = True
    extra: ClassVar[tuple[Extra, ...]] = (
        Extra("role_S", index=True, by=By.data),
        Extra("value_S", by=By.data),
        Extra("margin_S", by=By.data),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("loss", per="weight"),
        Column("weight"),
        Column("accuracy", per="compared"),
        Column("margin", per="compared"),
        Column("better", per="compared"),
        Column("worse", per="compared"),
        Column("compared"),
        *(Column(name, part=True) for name in _BINS),
    )

    @property
    def rows(self) -> str:  # type: ignore[override]
        """Pairs and rankings, or scores."""
        return "scores" if self.loss_type is RewardLoss.regression else "pairs"

    def rules(self) -> list[Rule]:
        """Ranges, and what excludes each other."""
        return [
            at_least("objective.center", self.center, 0, 10**6),
            Rule(
                not (self.center and self.loss_type is RewardLoss.regression),
                "objective.center",
                f"is {self.center}, and scores say where rewards lie",
                "set objective.center=0, or objective.loss_type=bradley_terry",
            ),
        ]

    def count(self, batch: Batch) -> RewardCount:
        """Prompts with comparisons, and answers."""
        roles = batch.host_S["role_S"]
        return RewardCount(sum(comparisons(batch).weight), float(sum(role == 0 for role in roles)))

    def loss(
        self, hidden_ND: torch.Tensor, head: Any, batch: Batch, denominators: RewardCount
    ) -> Loss:
        """Losses of comparisons, or of answers; the table has comparisons in either case."""
        import torch
        from torch.nn.functional import logsigmoid

        rewards_N = head.reward(hidden_ND)[: batch.num_targets]
        target_N = batch.sample_N[: batch.num_targets]
        num_samples = len(batch.sample_id_S)
        reward_S = rewards_N.new_zeros(num_samples).index_copy(0, target_N, rewards_N)
        channel_S = batch.channel_N.new_zeros(num_samples)
        channel_S = channel_S.index_copy(0, target_N, batch.channel_N[: batch.num_targets])
        pairs = comparisons(batch)
        device = rewards_N.device
        better_P, worse_P = (torch.tensor(x, dtype=torch.int64, device=device) for x in pairs[:2])
        weight_P, margin_P = (torch.tensor(x, device=device) for x in pairs[2:])
        r_i, r_j = reward_S[better_P], reward_S[worse_P]
        if self.loss_type is RewardLoss.regression:
            answer_S = batch.extra["role_S"] == 0
            squared_S = torch.where(answer_S, (reward_S - batch.extra["value_S"]) ** 2, 0.0)
            losses, weights, channels = squared_S, answer_S.to(reward_S), channel_S
            denominator = denominators.answers
        else:
            losses = -logsigmoid(r_i - r_j - margin_P) + self.center * (r_i + r_j) ** 2
            weights, channels, denominator = weight_P, channel_S[better_P], denominators.compared
        table_CK = rewards_N.new_zeros(head.num_channels, len(self.columns))
        with torch.no_grad():
            loss_table = torch.stack([losses * weights, weights], dim=1)
            table_CK[:, :2].index_add_(0, channels, loss_table)
            table_CK[:, 2:].index_add_(
                0, channel_S[better_P], _figures(r_i.detach(), r_j.detach(), weight_P)
            )
        # What has no comparison still takes part in backward, as sharded engines need.
        total = (losses * weights).sum() / (denominator or 1.0) + 0.0 * rewards_N.sum()
        return Loss(total, table_CK)

    def derived(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The expected calibration error (Guo et al., arXiv:1706.04599) of held-out comparisons.

        With what sigmoid(|r_i - r_j|) says, it is sum of bins |right - confidence| / comparisons.
        """
        total = sums["compared"]
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


def comparisons(batch: Batch) -> Comparisons:
    """All pairs of answers to one prompt of which one is worth more, on the host."""
    roles, values, margins = (batch.host_S[n] for n in ("role_S", "value_S", "margin_S"))
    answers: dict[int, list[int]] = {}
    for sample, unit in enumerate(batch.unit_S):
        if roles[sample] == 0:
            answers.setdefault(unit, []).append(sample)
    found = Comparisons([], [], [], [])
    for group in answers.values():
        pairs = [(i, j) for i in group for j in group if values[i] > values[j]]
        found.better.extend(i for i, _ in pairs)
        found.worse.extend(j for _, j in pairs)
        found.weight.extend(1 / len(pairs) for _ in pairs)
        found.margin.extend(margins[i] for i, _ in pairs)
    return found


def _figures(r_i: torch.Tensor, r_j: torch.Tensor, weight_P: torch.Tensor) -> torch.Tensor:
    """The columns behind loss and weight, one row a comparison."""
    import torch

    margin, right = r_i - r_j, (r_i > r_j).to(r_i)
    confidence = torch.sigmoid(margin.abs())
    place = ((confidence - 0.5) * (2 * NUM_BINS)).long().clamp(0, NUM_BINS - 1)
    in_bin = torch.nn.functional.one_hot(place, NUM_BINS).to(r_i)
    bins = torch.stack([in_bin * confidence[:, None], in_bin * right[:, None], in_bin], dim=2)
    means = torch.stack([right, margin, r_i, r_j, torch.ones_like(margin)], dim=1)
    return torch.cat([means, bins.flatten(1)], dim=1) * weight_P[:, None]
