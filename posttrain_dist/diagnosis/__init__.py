"""The rules over a run's loss history: their settings, what they find, when a run ends early."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["DiagnoseConfig"]


@dataclass(kw_only=True, slots=True)
class DiagnoseConfig:
    """The group `diagnose`: what depends on the run. Other thresholds stand beside their rule."""

    off: list[str] = field(default_factory=list)  # rules that are not evaluated
    early_stop: list[str] = field(
        default_factory=list
    )  # rules whose alarm, above level info, ends the run
    window: int = 30  # rows (logged steps) that a level, a median, is taken over
    overfit_evals: int = 3  # evaluations in a row above the best one
    low_loss: float = 0.2  # nats per token; the rows of a training loss below it are memorised
    starved_share: float = 0.01  # a channel below it, or a tenth of an equal share, is starved
