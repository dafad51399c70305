"""`hydra/launcher=basic`: the trials one after another, each a process on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_launch.sweep.backends.processes import Processes
from posttrain_launch.sweep.folder import Sweep, Trial


def restore(sweep: Sweep, options: Mapping[str, Any], *, debug: bool = False) -> InTurn:
    """The backend of a sweep."""
    return InTurn(Processes(debug=debug))


class InTurn:
    """One trial at a time, which prints what every run prints."""

    slots = 1
    retries = 0
    waits = True

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def start(self, trials: Sequence[Trial]) -> None:
        """Begin the one trial, or watch it."""
        for trial in trials:
            self._processes.start(trial)

    def running(self) -> set[int]:
        """The trial that runs, if one does."""
        return self._processes.running()

    def code(self, number: int) -> int | None:
        """The exit code of a trial that ended."""
        return self._processes.code(number)

    def stop(self) -> None:
        """Have the trial save and leave."""
        self._processes.stop()

    def close(self) -> None:
        """There is nothing to free."""
