"""The seams of a sweep: where its trials run (`Backend`), and which trials there are (`Search`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from posttrain_launch.sweep.folder import Trial


class Backend(Protocol):
    """Runs trials whose run folders are frozen: here in turn, as a Slurm array, on a Ray cluster.

    It is driven by one loop (`sweep/loop.py`) that polls, so that no backend needs threads of its
    own and a search can look at running trials in between.
    """

    slots: int | None  # trials that it takes at once; None: any number, it queues them itself

    def start(self, trials: Sequence[Trial]) -> None:
        """Begin, or go on with, trials; returns at once. One that runs already is left alone."""

    def running(self) -> set[int]:
        """Numbers of the trials that were started and have not ended; called every second or so."""

    def stop(self) -> None:
        """Have every running trial save and leave; returns when they have, or others watch them."""


class Search(Protocol):
    """Says which trials there are, and which to give up."""

    def ask(self, free: int) -> list[tuple[str, ...]]:
        """Overrides of up to `free` new trials; empty: none now, or none any more (`finished`)."""

    def observe(self, trial: Trial, step: int, value: float) -> bool:
        """Take in a held-out value of a running trial; True: it is to be pruned."""

    def tell(self, trial: Trial, value: float | None) -> None:
        """Take in how a trial ended; None: without a value (it failed)."""

    @property
    def finished(self) -> bool:
        """Whether no more trials will come."""
