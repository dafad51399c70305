"""Kahneman-Tversky optimisation: answers that are good or bad, without a pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from posttrain_dist.errors import Rule
from posttrain_dist.flow import Column, Extra, Loss
from posttrain_dist.objectives.preference.pairwise import (
    ANSWER_FIELDS,
    MAX_WEIGHT,
    beta_rule,
)
from posttrain_dist.objectives.reference_choice import OLD_LOGPROB, REF_LOGPROB, Referenced

if TYPE_CHECKING:
    import torch

    from posttrain_dist.flow import Batch
    from posttrain_dist.models.head import Head


class KtoCount(NamedTuple):
    """What the loss is divided by, and what z0 is made of."""

    answers: float
    others: float  # answers to another prompt
    kl: float  # sum over these of log p - log p of the reference, before the update

    @property
    def baseline(self) -> float:
        """z0, the estimate of KL(policy | reference): a mean over the step, 0 at least."""
        return max(0.0, self.kl / self.others) if self.others else 0.0


@dataclass(kw_only=True, slots=True)
class Kto(Referenced):
    """KTO (Ethayarajh et al., arXiv:2402.01306).

    Reference, with r the sum of log p - log p_ref over the tokens of an answer, and z0 the mean of
    r over answers to other prompts of the whole step, at least 0 and without gradient:

        loss = desirable_weight * (1 - torch.sigmoid(beta * (r - z0)))    # label 1
        loss = undesirable_weight * (1 - torch.sigmoid(beta * (z0 - r)))  # label 0
        total = loss.sum() / denominators.answers

    A reward is beta * r. The margin of an answer is by how much it lies on its side of z0:
    beta * (r - z0) where it is desirable, beta * (z0 - r) where it is not.
    """

    beta: float = 0.1  # how hard a distance from the reference is punished
    desirable_weight: float = 1.0
    # With far fewer of one kind, weigh it so that weight times number is about equal.
    undesirable_weight: float = 1.0

    rows: ClassVar[str] = "labels"
    extra: ClassVar[tuple[Extra, ...]] = (
        *ANSWER_FIELDS,
        REF_LOGPROB,
        OLD_LOGPROB,
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("loss", per="answers"),
        Column("answers"),
        Column("margin", per="answers"),
        Column("accuracy", per="answers"),
        *(
            Column(f"{kind}_{name}", per=kind)
            for kind in ("desirable", "undesirable")
            for name in ("logprob", "reward", "tokens")
        ),
        Column("desirable"),
        Column("undesirable"),
        Column("desirable_logratio", per="desirable"),  # log p - that of the reference
        Column("kl", per="others"),
        Column("others"),
    )
    lr_factor: ClassVar[float] = 0.1
    counts_evaluation: ClassVar[bool] = True

    def rules(self) -> list[Rule]:
        """Ranges."""
        weights = {
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }
        return [
            *Referenced.rules(self),
            beta_rule(self.beta),
            *(
                Rule(
                    0 < weight <= MAX_WEIGHT,
                    f"objective.{name}",
                    f"is {weight}, must be above 0 and at most {MAX_WEIGHT:,}",
                    f"set objective.{name}=1.0",
                )
                for name, weight in weights.items()
            ),
        ]

    def count(self, batch: Batch) -> KtoCount:
        """Answers, and the sum of log ratios that z0 is the mean of: the host waits for it."""
        import torch

        from posttrain_dist.objectives.preference import compared_answers as shared

        roles = batch.host_S["role_S"]
        others = roles.count(shared.OTHER)
        kl = 0.0
        if others:
            ratio_N = batch.extra[OLD_LOGPROB.name] - batch.extra[REF_LOGPROB.name]
            ratio_S = shared.sample_sums(batch, ratio_N)
            is_other_S = batch.extra["role_S"] == shared.OTHER
            kl = float(torch.where(is_other_S, ratio_S, 0.0).sum())
        return KtoCount(float(roles.count(shared.ANSWER)), float(others), kl)

    def evaluation_denominators(self, counts: KtoCount) -> KtoCount:
        """Sums are wanted, about the z0 of all held-out rows."""
        return counts._replace(answers=1.0)

    def start_loss(self, batch: Batch) -> float | None:
        """The loss of a batch alone while policy and reference are equal: r and z0 are 0."""
        answers = zip(batch.host_S["role_S"], batch.host_S["value_S"], strict=True)
        values = [value for role, value in answers if role == 0]
        weights = [self.desirable_weight if v > 0 else self.undesirable_weight for v in values]
        return sum(weights) / (2 * len(weights)) if weights else None

    def loss(
        self, hidden_ND: torch.Tensor, head: Head, batch: Batch, denominators: KtoCount
    ) -> Loss:
        """The mean over answers."""
        import torch

        from posttrain_dist.objectives.preference import compared_answers as shared

        device = batch.labels_N.device
        roles, values = batch.host_S["role_S"], batch.host_S["value_S"]
        mine = [i for i, role in enumerate(roles) if role == shared.ANSWER]
        answer_A = shared.host_tensor(mine, torch.int64, device)
        found = head.logprob(hidden_ND, batch.labels_N)
        answers = shared.answers_of(batch, found.logprob_N, batch.extra[REF_LOGPROB.name])
        desirable_A = batch.extra["value_S"][answer_A] > 0
        reward_A = self.beta * answers.logratio_S[answer_A]
        distance_A = reward_A - self.beta * denominators.baseline
        margin_A = torch.where(desirable_A, distance_A, -distance_A)
        weight_A = torch.where(desirable_A, self.desirable_weight, self.undesirable_weight)
        loss_A = weight_A * torch.sigmoid(-margin_A)
        total = shared.divided(loss_A.sum(), denominators.answers)
        sums = {
            "loss": loss_A,
            "answers": torch.ones_like(loss_A),
            "margin": margin_A,
            "accuracy": margin_A.detach() > 0,
        }
        for kind, kind_A in (("desirable", desirable_A), ("undesirable", ~desirable_A)):
            sums |= {
                kind: kind_A,
                f"{kind}_logprob": answers.logprob_S[answer_A] * kind_A,
                f"{kind}_reward": reward_A * kind_A,
                f"{kind}_logratio": answers.logratio_S[answer_A] * kind_A,
                f"{kind}_tokens": answers.tokens_S[answer_A] * kind_A,
            }
        table = shared.channel_table(
            batch, head.num_channels, self.columns, [(answer_A, sums), self._kl_columns(batch)]
        )
        good = [i for i in mine if values[i] > 0]
        nll_N, counted_N = -found.logprob_N.detach(), shared.token_mask(batch, good)
        return Loss(total.float(), table, nll_N, found.correct_N, counted_N)

    def _kl_columns(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What z0 is made of, by the channel of the answers to other prompts."""
        import torch

        from posttrain_dist.objectives.preference import compared_answers as shared

        roles = batch.host_S["role_S"]
        others = [i for i, role in enumerate(roles) if role == shared.OTHER]
        other_M = shared.host_tensor(others, torch.int64, batch.labels_N.device)
        ratio_N = batch.extra[OLD_LOGPROB.name] - batch.extra[REF_LOGPROB.name]
        ratio_M = shared.sample_sums(batch, ratio_N)[other_M]
        return other_M, {"kl": ratio_M, "others": torch.ones_like(ratio_M)}
