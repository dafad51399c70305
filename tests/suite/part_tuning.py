"""A tuning for tests: norms and one matrix of each layer are trained, and alone are saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from posttrain_dist.config import SLOTS
from posttrain_dist.tuning.base import Tuning

KEPT = "model.layers.0.mlp.up_proj.weight"  # frozen, and saved all the same


@dataclass(kw_only=True, slots=True)
class Part(Tuning):
    """Norms and query matrices; these learn twice as fast. Norms decay, which is unusual."""

    whole_model: ClassVar[bool] = False
    default_lr: ClassVar[float] = 3e-3

    def trained(self, name: str) -> bool:
        return "norm" in name or "q_proj" in name

    def kept(self, name: str) -> bool:
        return self.trained(name) or name == KEPT

    def decays(self, name: str, shape: object) -> bool:
        return "layernorm" in name or "q_proj.weight" in name

    def lr_ratio(self, name: str) -> float:
        return 2.0 if "q_proj" in name else 1.0


def register() -> None:
    """Make it an option of a configuration, for the life of a worker."""
    SLOTS["tuning"]["part"] = Part
