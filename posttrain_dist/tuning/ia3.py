"""IA3 (Liu et al., arXiv:2205.05638): vectors that scale keys, values and the MLP's inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from posttrain_dist.errors import Rule
from posttrain_dist.tuning.base import AdapterTuning, names_rule


@dataclass(kw_only=True, slots=True)
class Ia3(AdapterTuning):
    """One trained vector for each target, of ones at the start."""

    # auto (keys, values and the second linear of the MLP), or a list of names.
    targets: Any = "auto"

    default_lr: ClassVar[float] = 3e-3
    marks: ClassVar[tuple[str, ...]] = ("ia3_l",)

    def rules(self) -> list[Rule]:
        """The targets are names."""
        return [names_rule("tuning.targets", self.targets)]
