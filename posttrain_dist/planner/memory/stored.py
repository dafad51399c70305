"""A tensor that stays in memory for the whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from posttrain_dist.planner.plan import Item


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor.

    Attributes:
        name: in the causal LM after `attach`; the constants of a packed weight have its name and
            an ending.
        shape: as it is computed with; a packed weight is held as fewer elements.
        trained: it has a gradient and moments.
        parameter: ZeRO-3 shards it; else a buffer or constants, whole on every rank.
        size: number of elements, as it is computed with.
    """

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    item: Item
    trained: bool
    parameter: bool = True
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", math.prod(self.shape))
