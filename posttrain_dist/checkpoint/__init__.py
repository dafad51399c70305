"""Checkpoints: written aside, named last, found again by their manifest."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain_dist.errors import Rule, at_least

__all__ = ["CheckpointConfig"]


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """What is kept."""

    # Newest checkpoints that stay on disk, and the one of the best evaluation; 0: all.
    keep: int = 2
    export: bool = True  # at the end, write the model to export/, or the adapter to adapter/


def checkpoint_rules(checkpoint: CheckpointConfig) -> list[Rule]:
    """What must hold among the values of the group `checkpoint`."""
    return [at_least("checkpoint.keep", checkpoint.keep, 0)]
