"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain_dist.tuning.base import Tuning


@dataclass(kw_only=True, slots=True)
class Full(Tuning):
    """Every parameter is trained."""
