"""From files to batches: read, render, mask, pack, collate.

records -> template + masking -> packing -> collate -> loader
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DataConfig"]


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What to train on and how it is cut."""

    # A file, folder or glob of JSONL; `embedded` is the data set that comes with the package.
    train: str = "embedded"
    # The same for held-out rows; null: a share of the training rows (`embedded` has its own).
    eval: str | None = None
    eval_fraction: float = 0.05  # share of training rows held out when `eval` is null
    max_length: int = 2048  # tokens a pack at most; longer rows are cut and counted
    pack_window: int = 1024  # samples that packing may reorder among themselves
