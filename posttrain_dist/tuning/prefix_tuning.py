"""Prefix tuning (Li and Liang, arXiv:2101.00190): trained keys and values before every sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from posttrain_dist.errors import Rule
from posttrain_dist.tuning.base import AdapterTuning, virtual_tokens_rule


@dataclass(kw_only=True, slots=True)
class Prefix(AdapterTuning):
    """`tokens` key and value pairs in every layer, which each sample attends to first."""

    tokens: int = 20
    # Text whose keys and values the prefix begins with; null: zero.
    init_text: str | None = None

    default_lr: ClassVar[float] = 1e-2
    marks: ClassVar[tuple[str, ...]] = ("prefix",)

    def rules(self) -> list[Rule]:
        """Ranges."""
        return [virtual_tokens_rule(self.tokens)]
