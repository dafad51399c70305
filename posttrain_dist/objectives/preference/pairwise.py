"""The part that objectives over pairs share: counting, the SFT term, the table. No torch on top."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from posttrain_dist.errors import DataError, Rule, at_least
from posttrain_dist.flow import By, Column, Extra, Loss
from posttrain_dist.objectives.base import Objective
from posttrain_dist.objectives.preference.loss_types import WITH_MARGIN
from posttrain_dist.objectives.reference_choice import REF_LOGPROB

if TYPE_CHECKING:
    import torch

    from posttrain_dist.flow import Batch
    from posttrain_dist.models.head import Head
    from posttrain_dist.objectives.preference.compared_answers import Answers, Comparisons

MAX_WEIGHT = 10**6  # of a component, and of beta
ANSWER_FIELDS = (Extra("role_S", index=True, by=By.data), Extra("value_S", by=By.data))
# Of each comparison; beside these, where there is a reference, "chosen_logratio".
_PER_PAIR = (
    "margin",  # of the rewards
    "accuracy",  # share of comparisons with a margin above 0
    "raw_accuracy",  # share where the better answer is the more likely one
    "chosen_logprob",
    "rejected_logprob",
    "chosen_reward",
    "rejected_reward",
    "chosen_tokens",
    "rejected_tokens",
)


class PairCount(NamedTuple):
    """What a loss over pairs is divided by."""

    comparisons: float  # sum of their weights: 1 for each pair, and for each ranking
    sft_tokens: float  # targets of the answers that nothing is preferred to


class Compared(NamedTuple):
    """What an objective makes of the answers of a batch."""

    loss_P: torch.Tensor  # of each comparison, with gradient
    reward_S: torch.Tensor  # of each answer: what the metrics compare


@dataclass(kw_only=True, slots=True)
class PairObjective(Objective):
    """A loss of two answers to one prompt, and beside it that of SFT on the better one.

    Reference, with comparisons (i, j, weight) of each unit, loss(i, j) that of the objective, and
    nll(i) the sum of -log p over the tokens of answer i:

        total  = sum(weight * loss(i, j)) / denominators.comparisons
        total += sft_weight * sum(nll(i) for the best i of each unit) / denominators.sft_tokens

    `train/loss` is the first of the two, `<objective>/sft_loss` the second without its weight.
    """

    rows: ClassVar[str] = "pairs"
    extra: ClassVar[tuple[Extra, ...]] = (*ANSWER_FIELDS, Extra("margin_S", by=By.data))
    columns: ClassVar[tuple[Column, ...]] = (
        Column("loss", per="comparisons"),
        Column("comparisons"),
        *(Column(name, per="comparisons") for name in _PER_PAIR),
        Column("sft_loss", per="sft_tokens"),
        Column("sft_tokens"),
    )
    lr_factor: ClassVar[float] = 0.1
    no_dropout: ClassVar[bool] = True

    @property
    def nll_weight(self) -> float:
        """`sft_weight`, of those that have one."""
        return 0.0

    def check_extra(self, batch: Batch) -> None:
        """Also that no row has a margin that would be ignored.

        Raises:
            DataError: one has, or a declared field is missing.
        """
        Objective.check_extra(self, batch)
        margin_S = batch.host_S["margin_S"]
        if self.without_margin and any(margin_S):
            sample = next(batch.sample_id_S[i] for i, margin in enumerate(margin_S) if margin)
            raise DataError(
                f"has a margin, which {self.without_margin} has no place for",
                where=f"sample {sample}",
                fix="leave the column out, or use objective=simpo, or objective=dpo with loss_type="
                + ", ".join(each.name for each in WITH_MARGIN),
            )

    def count(self, batch: Batch) -> PairCount:
        """Comparisons, and tokens of the SFT term; both known on the host."""
        from posttrain_dist.objectives.preference.compared_answers import (
            best_answers,
            comparisons_of,
        )

        weights = [each.weight for each in comparisons_of(batch)]
        tokens = sum(batch.targets_S[i] for i in best_answers(batch))
        return PairCount(sum(weights), float(tokens))

    def compare(self, answers: Answers, pairs: Comparisons) -> Compared:
        """The loss of each comparison, and the reward of each answer."""
        raise NotImplementedError

    def loss(
        self, hidden_ND: torch.Tensor, head: Head, batch: Batch, denominators: PairCount
    ) -> Loss:
        """The mean over comparisons, and the SFT term."""
        import torch

        from posttrain_dist.objectives.preference import compared_answers as shared

        best = shared.best_answers(batch)
        pairs = shared.on_device(batch, shared.comparisons_of(batch))
        found = head.logprob(hidden_ND, batch.labels_N)
        reference_N = batch.extra[REF_LOGPROB.name] if REF_LOGPROB in self.extra else None
        answers = shared.answers_of(batch, found.logprob_N, reference_N)
        compared = self.compare(answers, pairs)
        device = batch.labels_N.device
        best_B = shared.host_tensor(best, torch.int64, device)
        nll_B = -answers.logprob_S[best_B]
        total = shared.divided((compared.loss_P * pairs.weight_P).sum(), denominators.comparisons)
        sft = shared.divided(nll_B.sum(), denominators.sft_tokens)
        table = shared.channel_table(
            batch,
            head.num_channels,
            self.columns,
            [
                (pairs.better_P, _pair_columns(answers, compared, pairs)),
                (best_B, {"sft_loss": nll_B, "sft_tokens": answers.tokens_S[best_B]}),
            ],
        )
        counted_N = shared.token_mask(batch, best)
        nll_N = -found.logprob_N.detach()
        total = (total + self.nll_weight * sft).float()
        return Loss(total, table, nll_N, found.correct_N, counted_N)


def _pair_columns(
    answers: Answers, compared: Compared, pairs: Comparisons
) -> dict[str, torch.Tensor]:
    """Each column's share in the table, of each comparison."""
    better_P, worse_P = pairs.better_P, pairs.worse_P
    reward_S, logprob_S = compared.reward_S.detach(), answers.logprob_S.detach()
    margin_P = reward_S[better_P] - reward_S[worse_P]
    values: dict[str, Any] = {
        "loss": compared.loss_P,
        "comparisons": 1.0,
        "margin": margin_P,
        "accuracy": margin_P > 0,
        "raw_accuracy": logprob_S[better_P] > logprob_S[worse_P],
        "chosen_logratio": answers.logratio_S.detach()[better_P],
    }
    for name, of_S in (("logprob", logprob_S), ("reward", reward_S), ("tokens", answers.tokens_S)):
        values |= {f"chosen_{name}": of_S[better_P], f"rejected_{name}": of_S[worse_P]}
    return {name: value * pairs.weight_P for name, value in values.items()}


def sft_weight_rule(weight: float) -> Rule:
    """The range of `sft_weight`."""
    return at_least("objective.sft_weight", weight, 0, MAX_WEIGHT)


def beta_rule(beta: float) -> Rule:
    """beta above 0: with 0 every answer has the same reward, and nothing is learned."""
    return Rule(
        0 < beta <= MAX_WEIGHT,
        "objective.beta",
        f"is {beta}, must be above 0 and at most {MAX_WEIGHT:,}: with 0 every answer has the "
        "reward 0 and nothing is trained",
        "set objective.beta to for instance 0.1",
    )
