"""The search of Hydra's own syntax: every combination of the values that were typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from posttrain_dist.errors import ConfigError
from posttrain_launch.sweep.base import Proposal
from posttrain_launch.sweep.folder import State, Sweep, Trial


def plan(sweeper: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The trials of `a=1,2 b=range(3) c=choice(x,y) d=shuffle(…)`, for sweep.json.

    Args:
        sweeper: `hydra.sweeper` as composed; its `params` hold more overrides.
        overrides: as typed, Hydra's own left out.

    Raises:
        ConfigError: a value is a range without steps, or a combination comes twice.
    """
    given = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*given, *overrides])
    for override in parsed:
        if override.is_interval_sweep():
            raise ConfigError(
                "is a range without steps, which holds no list of trials",
                where=override.key_or_group,
                fix="write the values, logrange(first,last,count), range(start,stop,step), or add "
                "hydra/sweeper=posttrain_optuna, which searches in it",
            )
    [trials] = BasicSweeper.split_arguments(parsed, None)
    seen: set[tuple[str, ...]] = set()
    for trial in trials:
        if tuple(trial) in seen:
            twice = [text for text in trial if any(text not in other for other in trials)]
            raise ConfigError(
                f"{' '.join(twice or trial)} comes twice",
                where="-m",
                fix="name each value once",
            )
        seen.add(tuple(trial))
    return {"kind": "basic", "trials": trials}


def restore(sweep: Sweep) -> Combinations:
    """The search of a sweep."""
    return Combinations([tuple(trial) for trial in sweep.search["trials"]])


class Combinations:
    """A list of trials, in its order; nothing is given up."""

    def __init__(self, trials: list[tuple[str, ...]]) -> None:
        self._trials = trials
        self._next = 0

    def resume(self, trials: Sequence[Trial]) -> None:
        """Go on behind the trials that there are: they came from the same list, in its order."""
        self._next = len(trials)

    def ask(self, free: int) -> list[Proposal]:
        """The next ones."""
        chosen = self._trials[self._next : self._next + free]
        self._next += len(chosen)
        return [Proposal(overrides) for overrides in chosen]

    def observe(self, trial: Trial, step: int, value: float) -> bool:
        """Nothing is pruned."""
        return False

    def tell(self, trial: Trial, state: State, value: float | None) -> None:
        """Nothing depends on it."""

    @property
    def finished(self) -> bool:
        """Whether all were handed out."""
        return self._next >= len(self._trials)
