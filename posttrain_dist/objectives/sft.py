"""Supervised fine-tuning: assistant turns and their end-of-turn token are supervised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from posttrain_dist.objectives.base import TokenLoss


@dataclass(kw_only=True, slots=True)
class Sft(TokenLoss):
    """Next-token loss on what the assistant says (Ouyang et al. 2022, section 3.5)."""

    rows: ClassVar[str] = "messages"
