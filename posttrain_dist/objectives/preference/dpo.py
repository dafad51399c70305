"""Direct preference optimisation and its family: one dataclass, the losses are its knob."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from posttrain_dist.errors import DataError, Rule
from posttrain_dist.flow import Column, Extra
from posttrain_dist.objectives.preference.loss_types import (
    WITH_DIVERGENCE,
    WITH_MARGIN,
    WITH_SMOOTHING,
    Divergence,
    LossType,
)
from posttrain_dist.objectives.preference.pairwise import (
    MAX_WEIGHT,
    Compared,
    PairObjective,
    beta_rule,
    sft_weight_rule,
)
from posttrain_dist.objectives.reference_choice import REF_LOGPROB, Referenced

if TYPE_CHECKING:
    import torch

    from posttrain_dist.flow import Batch
    from posttrain_dist.objectives.preference.compared_answers import Answers, Comparisons
    from posttrain_dist.objectives.preference.pair_losses import PairScores


@dataclass(kw_only=True, slots=True)
class Dpo(PairObjective, Referenced):
    """DPO (Rafailov et al., arXiv:2305.18290) and its family; pair_losses.py has the formulas.

    Reference of the default, with logp and ref_logp the sums over the tokens of an answer:

        margin = beta * ((logp[i] - ref_logp[i]) - (logp[j] - ref_logp[j]))
        loss = -F.logsigmoid(margin - margin_S[i])

    A reward in its metrics is beta * (logp - ref_logp), whatever the loss.
    """

    beta: float = 0.1  # how hard a distance from the reference is punished
    loss_type: LossType = LossType.sigmoid
    # A weighted sum of losses in place of `loss_type`, such as {sigmoid: 1.0, ipo: 0.2}.
    losses: dict[str, float] = field(default_factory=dict)
    label_smoothing: float = 0.0  # share of the pairs that are labelled the wrong way round
    f_divergence: Divergence = Divergence.reverse_kl
    alpha: float = 0.5  # of f_divergence=alpha, in (0, 1): 0 is the reverse KL, 1 the forward KL
    sft_weight: float = 0.0  # of the SFT term; 1.0 keeps the better answers likely

    extra: ClassVar[tuple[Extra, ...]] = (*PairObjective.extra, REF_LOGPROB)
    columns: ClassVar[tuple[Column, ...]] = (
        *PairObjective.columns,
        Column("chosen_logratio", per="comparisons"),  # log p - that of the reference
    )

    @property
    def nll_weight(self) -> float:
        """`sft_weight`."""
        return self.sft_weight

    @property
    def weights(self) -> dict[LossType, float]:
        """Every loss and its weight."""
        if not self.losses:
            return {self.loss_type: 1.0}
        return {LossType[name]: weight for name, weight in self.losses.items()}

    def rules(self) -> list[Rule]:
        """Ranges, and what excludes each other."""
        names = ", ".join(LossType.__members__)
        unknown = [name for name in self.losses if name not in LossType.__members__]
        rules = [
            *Referenced.rules(self),
            sft_weight_rule(self.sft_weight),
            beta_rule(self.beta),
            Rule(
                0 <= self.label_smoothing < 0.5,
                "objective.label_smoothing",
                f"is {self.label_smoothing}, must be in [0, 0.5): from a half on the labels say "
                "nothing, or the contrary",
                "set it to the share of pairs that are labelled wrongly, such as 0.1",
            ),
            Rule(
                0 < self.alpha < 1,
                "objective.alpha",
                f"is {self.alpha}, must be between 0 and 1",
                "set objective.alpha=0.5, or f_divergence=reverse_kl (alpha 0) or forward_kl (1)",
            ),
            Rule(
                not unknown,
                "objective.losses",
                f"has no loss {', '.join(unknown)}",
                f"the losses are {names}",
            ),
            Rule(
                all(0 < weight <= MAX_WEIGHT for weight in self.losses.values()),
                "objective.losses",
                f"is {self.losses}: each weight must be above 0 and at most {MAX_WEIGHT:,}",
                "leave a loss out in place of giving it the weight 0",
            ),
            Rule(
                not self.losses or self.loss_type is LossType.sigmoid,
                "objective.losses",
                f"is set together with objective.loss_type={self.loss_type.name}",
                "name every loss in objective.losses, and leave loss_type out",
            ),
        ]
        return rules if unknown else [*rules, *self._combinations()]

    def _combinations(self) -> list[Rule]:
        """Knobs that one of the losses has no place for."""
        smoothing, losses = self.label_smoothing, self.weights
        no_smoothing = [each.name for each in losses if each not in WITH_SMOOTHING]
        no_divergence = [each.name for each in losses if each not in WITH_DIVERGENCE]
        return [
            Rule(
                smoothing == 0 or not no_smoothing,
                "objective.label_smoothing",
                f"is {smoothing}, and {', '.join(no_smoothing)} knows no wrong labels",
                f"set it to 0, or use {', '.join(each.name for each in WITH_SMOOTHING)}",
            ),
            Rule(
                smoothing > 0 or LossType.exo_pair not in losses,
                "objective.label_smoothing",
                "is 0, and exo_pair takes the logarithm of it",
                "set objective.label_smoothing=0.001",
            ),
            Rule(
                self.f_divergence is Divergence.reverse_kl or not no_divergence,
                "objective.f_divergence",
                f"is {self.f_divergence.name}, and {', '.join(no_divergence)} is made for "
                "reverse_kl alone",
                f"use reverse_kl, or {', '.join(each.name for each in WITH_DIVERGENCE)}",
            ),
        ]

    def check_extra(self, batch: Batch) -> None:
        """Also that no row has a margin that a loss would ignore.

        Raises:
            DataError: one has, or a declared field is missing.
        """
        PairObjective.check_extra(self, batch)
        without = [each.name for each in self.weights if each not in WITH_MARGIN]
        margin_S = batch.host_S["margin_S"]
        if without and any(margin_S):
            sample = next(batch.sample_id_S[i] for i, margin in enumerate(margin_S) if margin)
            raise DataError(
                f"has a margin, which {', '.join(without)} has no place for",
                where=f"sample {sample}",
                fix="leave the column out, or use objective.loss_type="
                + ", ".join(each.name for each in WITH_MARGIN),
            )

    def compare(self, answers: Answers, pairs: Comparisons) -> Compared:
        """The weighted sum of the losses of each comparison."""
        from posttrain_dist.objectives.preference.pair_losses import PairScores, score

        score_S = score(answers.logratio_S, self.f_divergence, self.alpha)
        mean_S = answers.mean_logratio
        better_P, worse_P = pairs.better_P, pairs.worse_P
        scores = PairScores(
            score_S[better_P], score_S[worse_P], mean_S[better_P], mean_S[worse_P], pairs.margin_P
        )
        return Compared(self._losses(scores), self.beta * answers.logratio_S)

    def start_loss(self, batch: Batch) -> float | None:
        """The loss of a batch alone while policy and reference are equal: ln 2 of the default."""
        import torch

        from posttrain_dist.objectives.preference import compared_answers as shared
        from posttrain_dist.objectives.preference.pair_losses import PairScores

        if not (found := shared.comparisons_of(batch)):
            return None
        zero_P = torch.zeros(len(found), dtype=torch.float64)
        margin_P = zero_P.new_tensor([batch.host_S["margin_S"][each.better] for each in found])
        weight_P = zero_P.new_tensor([each.weight for each in found])
        loss_P = self._losses(PairScores(zero_P, zero_P, zero_P, zero_P, margin_P))
        best_N = shared.token_mask(batch, shared.best_answers(batch))
        nll_N = torch.where(best_N > 0, -batch.extra[REF_LOGPROB.name].double(), 0.0)
        sft = float(nll_N.sum() / best_N.sum())
        return float((loss_P * weight_P).sum() / weight_P.sum()) + self.sft_weight * sft

    def _losses(self, scores: PairScores) -> torch.Tensor:
        """The weighted sum of the losses of each comparison."""
        from posttrain_dist.objectives.preference.pair_losses import PAIR_LOSSES

        losses = [
            weight * PAIR_LOSSES[each](scores, self.beta, self.label_smoothing)
            for each, weight in self.weights.items()
        ]
        return sum(losses[1:], losses[0])
