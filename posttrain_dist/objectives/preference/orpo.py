"""Odds ratio preference optimisation: SFT and preference in one, without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain_dist.errors import Rule
from posttrain_dist.objectives.preference.pairwise import Compared, PairObjective, beta_rule

if TYPE_CHECKING:
    from posttrain_dist.objectives.preference.compared_answers import Answers, Comparisons


@dataclass(kw_only=True, slots=True)
class Orpo(PairObjective):
    """ORPO (Hong et al., arXiv:2403.07691): the answer's own loss, and beta times the odds ratio.

    Reference, with p the mean log-probability per token of an answer:

        log_odds = (p[i] - p[j]) - (torch.log1p(-p[i].exp()) - torch.log1p(-p[j].exp()))
        loss = -p[i] - beta * F.logsigmoid(log_odds)

    Both parts are means over pairs, as in the paper. A reward is beta * p.
    """

    beta: float = 0.1  # lambda of the paper

    def rules(self) -> list[Rule]:
        """Ranges."""
        return [beta_rule(self.beta)]

    def compare(self, answers: Answers, pairs: Comparisons) -> Compared:
        """The loss of each comparison."""
        import torch
        from torch.nn.functional import logsigmoid

        mean_S = answers.mean_logprob
        # Of an answer that is certain the odds are infinite: its mean is 0.
        odds_S = mean_S - torch.log(-torch.expm1(mean_S.clamp(max=-1e-12)))
        log_odds_P = odds_S[pairs.better_P] - odds_S[pairs.worse_P]
        loss_P = -mean_S[pairs.better_P] - self.beta * logsigmoid(log_odds_P)
        return Compared(loss_P, self.beta * mean_S)
