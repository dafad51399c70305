"""Checkpoints: written aside, named last, found again by their manifest."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CheckpointConfig"]


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """What is kept."""

    # Newest checkpoints that stay on disk, and the one of the best evaluation; 0: all.
    keep: int = 2
    export: bool = True  # write a Hugging Face folder to export/ at the end
