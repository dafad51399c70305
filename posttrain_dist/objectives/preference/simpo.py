"""Simple preference optimisation: the length-normalised log-probability is the reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain_dist.errors import Rule, at_least
from posttrain_dist.objectives.preference.pairwise import (
    MAX_WEIGHT,
    Compared,
    PairObjective,
    beta_rule,
    sft_weight_rule,
)

if TYPE_CHECKING:
    from posttrain_dist.objectives.preference.compared_answers import Answers, Comparisons


@dataclass(kw_only=True, slots=True)
class Simpo(PairObjective):
    """SimPO (Meng et al., arXiv:2405.14734), without a reference.

    Reference, with p the mean log-probability per token of an answer:

        loss = -F.logsigmoid(beta * (p[i] - p[j]) - gamma - margin_S[i])

    A reward is beta * p.
    """

    beta: float = 2.0
    gamma: float = 1.0  # by how much at least the better answer's reward is to be higher
    sft_weight: float = 0.0  # of the SFT term; 1.0 keeps the better answers likely

    @property
    def nll_weight(self) -> float:
        """`sft_weight`."""
        return self.sft_weight

    def rules(self) -> list[Rule]:
        """Ranges."""
        return [
            sft_weight_rule(self.sft_weight),
            beta_rule(self.beta),
            at_least("objective.gamma", self.gamma, 0, MAX_WEIGHT),
        ]

    def compare(self, answers: Answers, pairs: Comparisons) -> Compared:
        """The loss of each comparison."""
        from torch.nn.functional import logsigmoid

        reward_S = self.beta * answers.mean_logprob
        margin_P = reward_S[pairs.better_P] - reward_S[pairs.worse_P]
        return Compared(-logsigmoid(margin_P - self.gamma - pairs.margin_P), reward_S)
