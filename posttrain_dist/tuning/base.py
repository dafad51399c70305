"""Which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Tuning:
    """The slot: one of the options below."""


@dataclass(kw_only=True, slots=True)
class Full(Tuning):
    """Every parameter is trained."""
