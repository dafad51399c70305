"""Prompt tuning (Lester et al., arXiv:2104.08691) and P-tuning (Liu et al., arXiv:2103.10385).

Trained vectors that stand before every sample of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from posttrain_dist.errors import Rule, at_least
from posttrain_dist.tuning.base import AdapterTuning, virtual_tokens_rule


@dataclass(kw_only=True, slots=True)
class Prompt(AdapterTuning):
    """`tokens` trained embeddings before every sample."""

    tokens: int = 20
    # Text whose tokens' embeddings the prompt begins with; null: those of random words.
    init_text: str | None = None
    ensemble: int = 1  # prompts that are trained side by side for one task

    default_lr: ClassVar[float] = 0.2
    marks: ClassVar[tuple[str, ...]] = ("prompt",)

    def rules(self) -> list[Rule]:
        """Ranges."""
        return [
            virtual_tokens_rule(self.tokens),
            at_least("tuning.ensemble", self.ensemble, 1, 10**4),
        ]


@dataclass(kw_only=True, slots=True)
class PTuning(AdapterTuning):
    """`tokens` embeddings that a small trained MLP makes, before every sample."""

    tokens: int = 20
    hidden_size: int | None = None  # of the MLP; null: that of the model
    layers: int = 2

    default_lr: ClassVar[float] = 1e-3
    marks: ClassVar[tuple[str, ...]] = ("prompt_encoder",)

    def rules(self) -> list[Rule]:
        """Ranges."""
        return [
            virtual_tokens_rule(self.tokens),
            at_least("tuning.hidden_size", self.hidden_size, 1, 10**7),
            at_least("tuning.layers", self.layers, 1, 10**3),
        ]
