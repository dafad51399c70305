"""The seams of a sweep: where its trials run (`Backend`), and which trials there are (`Search`).

A search is a module that holds two functions, and `sweep/kinds.py` lists the modules by the names
that `hydra/sweeper=` has for them:

    plan(sweeper, overrides) -> dict    what sweep.json keeps as `search`, plain values: the space,
                                        checked; `metric` and `direction` in it go to the sweep
    restore(sweep) -> Search            from `sweep.search`, at the first start and each later one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain_launch.sweep.folder import State, Trial


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a search has to say of a trial that does not exist yet."""

    overrides: tuple[str, ...]  # all of the trial's, the shared ones included, one value each
    extra: dict[str, Any] = field(default_factory=dict)  # JSON; it comes back as `Trial.extra`


class Backend(Protocol):
    """Runs trials whose run folders are frozen: here in turn, as a Slurm array, on a Ray cluster.

    It is driven by one loop (`sweep/loop.py`) that polls, so that no backend needs threads of its
    own and a search can look at running trials in between.
    """

    slots: int | None  # trials that it takes at once; None: any number, it queues them itself
    waits: bool  # false: the loop leaves once there is nothing more to start
    retries: int  # times that a trial is started again if its exit code says that it may be

    def start(self, trials: Sequence[Trial]) -> None:
        """Begin, or go on with, trials; returns at once. One that runs already is left alone."""

    def running(self) -> set[int]:
        """Numbers of the trials that were started and have not ended; called every second or so."""

    def code(self, number: int) -> int | None:
        """The exit code of a trial that ended, a signal's number negative; None: nobody knows."""

    def stop(self) -> None:
        """Have every running trial save and leave; returns when they have, or others watch them."""

    def close(self) -> None:
        """Free what the backend itself holds, such as a Ray that it started."""


class Search(Protocol):
    """Says which trials there are, and which to give up.

    The driver of a sweep may be killed at any point and started again. So each method may be called
    again with what it was given before, and must not count it twice.
    """

    def resume(self, trials: Sequence[Trial]) -> None:
        """Called once, first: every trial in trials.jsonl, ended or not. What was proposed and is
        not among them has no trial, and none comes of it unless it is proposed again."""

    def ask(self, free: int) -> list[Proposal]:
        """Up to `free` new trials; empty: none now, or none any more (`finished`)."""

    def observe(self, trial: Trial, step: int, value: float) -> bool:
        """Take in a held-out value of a running trial; True: it is to be pruned.

        The values of a trial come in the order of their steps, from the first one on again after a
        restart of the driver or of the trial.
        """

    def tell(self, trial: Trial, state: State, value: float | None) -> None:
        """Take in how a trial ended: done, pruned or failed.

        Args:
            value: its last held-out value; None: it has none.
        """

    @property
    def finished(self) -> bool:
        """Whether no more trials will come."""
