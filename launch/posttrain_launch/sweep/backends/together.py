"""`hydra/launcher=together`: LoRA trials side by side in one process, over one frozen base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import ConfigError
from posttrain_dist.together.compatible import check_together
from posttrain_launch.run.driver import read_frozen
from posttrain_launch.sweep.backends.processes import Processes
from posttrain_launch.sweep.folder import Sweep, Trial
from posttrain_launch.sweep.states import code_of_last_start


def restore(sweep: Sweep, options: Mapping[str, Any], *, debug: bool = False) -> Together:
    """The backend of a sweep.

    Raises:
        ConfigError: `at_once` is no number of trials.
    """
    at_once = options["at_once"]
    if at_once < 1:
        raise ConfigError(
            f"is {at_once}, must be at least 1",
            where="hydra.launcher.at_once",
            fix="set it to the trials that train in one process, such as 4",
        )
    return Together(Processes(debug=debug), at_once)


class Together:
    """Processes one after another, each of which trains several trials.

    Trials that cannot share a base, data or steps are trained by themselves.
    """

    retries = 0
    waits = True

    def __init__(self, processes: Processes, at_once: int) -> None:
        self._processes, self._at_once = processes, at_once
        self._group: list[Trial] = []  # those that train
        self._waiting: list[list[Trial]] = []
        self._codes: dict[int, int | None] = {}

    @property
    def slots(self) -> int:
        """Trials of a process; none while one runs, for it takes no more in."""
        return 0 if self._group or self._waiting else self._at_once

    def start(self, trials: Sequence[Trial]) -> None:
        """Begin a process for those that can share one, then one for the others."""
        found = groups(trials)
        for trial, why in found.alone.items():
            print(f"trial {trial} trains by itself: {why}", flush=True)
        self._waiting += found.groups
        self._next()

    def running(self) -> set[int]:
        """Those that train and those that wait for them; the trials of a process end with it."""
        if self._group and self._group[0].number not in self._processes.running():
            alone = len(self._group) == 1
            for trial in self._group:
                code = self._processes.code(trial.number) if alone else None
                self._codes[trial.number] = (
                    code_of_last_start(trial.folder) if code is None else code
                )
            self._group = []
            self._next()
        return {trial.number for group in (self._group, *self._waiting) for trial in group}

    def code(self, number: int) -> int | None:
        """The exit code of a trial, as it was recorded."""
        return self._codes.get(number)

    def stop(self) -> None:
        """Have the trials that train save and leave; the others have not begun."""
        self._waiting = []
        self._processes.stop()

    def close(self) -> None:
        """There is nothing to free."""

    def _next(self) -> None:
        if self._group or not self._waiting:
            return
        self._group = self._waiting.pop(0)
        first, *others = self._group
        more = ["--together", *(str(trial.folder) for trial in others)] if others else []
        self._processes.start(first, more)


@dataclass(slots=True)
class Groups:
    """Trials in groups that can train together, in their order."""

    groups: list[list[Trial]] = field(default_factory=list)
    alone: dict[int, str] = field(default_factory=dict)  # number of one that cannot -> why


def groups(trials: Sequence[Trial]) -> Groups:
    """What of these trials can share a process."""
    found, firsts = Groups(), list[RunConfig]()
    for trial in trials:
        config, why = read_frozen(trial.folder), ""
        for first, group in zip(firsts, found.groups, strict=True):
            try:
                check_together([first, config])
            except ConfigError as error:
                why = why or f"{error.where} {error.what}"
                continue
            group.append(trial)
            found.alone.pop(group[0].number, None)
            break
        else:
            firsts.append(config)
            found.groups.append([trial])
            if why := why or why_alone(config):
                found.alone[trial.number] = why
    return found


def why_alone(config: RunConfig) -> str:
    """Why a run can share a base with no other; empty where it can."""
    try:
        check_together([config])
    except ConfigError as error:
        return f"{error.where} {error.what}"
    return ""
