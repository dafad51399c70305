"""What the rules must know of a run beside its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Model, objective and mixture of a run; None: not known."""

    parameters: int | None = None
    vocab_size: int | None = None
    random_weights: bool = False  # training from scratch
    token_loss: bool = True  # the loss is a cross-entropy of tokens
    # From a step on: channel -> target share of the weight; empty: the data is taken as it is.
    # At each of these steps the mixture changes, even where the shares by channel stay.
    target_shares: dict[int, dict[str, float]] = field(default_factory=dict)

    def target_shares_at(self, step: int) -> dict[str, float]:
        """Channel -> target share of the weight at `step`."""
        start = max((first for first in self.target_shares if first <= step), default=0)
        return self.target_shares.get(start, {})
