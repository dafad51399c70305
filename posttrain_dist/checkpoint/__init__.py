"""Checkpoints: written aside, named last, found again by their manifest."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CheckpointConfig"]


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """What is kept."""

    keep: int = 2  # newest checkpoints that stay on disk; 0: all
    export: bool = True  # write a Hugging Face folder to export/ at the end
