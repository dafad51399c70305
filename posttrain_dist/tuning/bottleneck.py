"""Bottleneck adapters (Houlsby et al., arXiv:1902.00751): small MLPs inside the layers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from posttrain_dist.errors import Rule, at_least
from posttrain_dist.tuning.base import AdapterTuning, above_zero


class Placement(Enum):
    """Where the adapters stand."""

    houlsby = "houlsby"  # after the attention and after the MLP
    pfeiffer = "pfeiffer"  # after the MLP (Pfeiffer et al., arXiv:2005.00247)
    parallel = "parallel"  # beside the MLP (He et al., arXiv:2110.04366)


class Nonlinearity(Enum):
    """Between the two matrices."""

    relu = "relu"
    silu = "silu"
    gelu = "gelu"


@dataclass(kw_only=True, slots=True)
class Bottleneck(AdapterTuning):
    """x + scale · up(f(down(x))), with `up` zero at the start."""

    placement: Placement = Placement.pfeiffer
    reduction: int = 16  # hidden size over the width of the bottleneck
    nonlinearity: Nonlinearity = Nonlinearity.relu
    scale: float = 1.0

    default_lr: ClassVar[float] = 1e-3
    marks: ClassVar[tuple[str, ...]] = ("bottleneck",)

    def rules(self) -> list[Rule]:
        """Ranges; the sizes of the model are compared when it is there."""
        return [
            at_least("tuning.reduction", self.reduction, 1, 10**6),
            above_zero("tuning.scale", self.scale, 10**6),
        ]

    @property
    def unmergeable(self) -> str:
        """Always, by the function between the matrices."""
        return (
            f"a bottleneck adapter has a {self.nonlinearity.name} between its matrices, which no "
            "weight of the model can take in"
        )
