"""`tuning=auto`: the planner takes the first method that fits, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain_dist.errors import Rule, at_least
from posttrain_dist.tuning.base import Tuning, above_zero, names_rule


@dataclass(kw_only=True, slots=True)
class AutoTuning(Tuning):
    """full, then lora, then qlora. It is another of these by the time that anything is trained."""

    rank: int = 16  # of LoRA, if that is what fits
    alpha: float = 32.0
    targets: Any = "all-linear"

    def rules(self) -> list[Rule]:
        """Those of the same values of LoRA."""
        return [
            at_least("tuning.rank", self.rank, 1, 10**6),
            above_zero("tuning.alpha", self.alpha, 10**6),
            names_rule("tuning.targets", self.targets),
        ]
