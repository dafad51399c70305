"""Plain next-token training on `{"text"}` rows: every token but the first is a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from posttrain_dist.objectives.base import TokenLoss


@dataclass(kw_only=True, slots=True)
class Pretrain(TokenLoss):
    """Next-token loss on whole documents."""

    rows: ClassVar[str] = "text"
