"""The search of `hydra/sweeper=posttrain_optuna`: Optuna by ask and tell, behind our own loop."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from posttrain_dist.errors import PosttrainError
from posttrain_dist.files import read_rows
from posttrain_launch.sweep.base import Proposal
from posttrain_launch.sweep.folder import State, Sweep, Trial
from posttrain_launch.sweep.search.journal import FILE, open_study
from posttrain_launch.sweep.search.methods import is_poor, make_sampler
from posttrain_launch.sweep.search.options import (
    CHANNEL,
    NAME,
    TOTAL,
    OptunaSweeper,
    checked_options,
)
from posttrain_launch.sweep.search.space import MOST_COMBINATIONS, Dimension, Space, read_space

NUMBER = "optuna"  # in Trial.extra: Optuna's number of the trial
# Attributes of Optuna's trials, in the journal.
REPEATS = "repeats"  # it proposed what an earlier one had: not to be trained
PRUNED_AT = "pruned_at"  # the step after which it was given up
RETOLD = "retold"  # the number of a failed trial that was started again, of which this is the end
QUEUED = 4  # trials at a time, where the launcher takes any number and none was given
ATTEMPTS = 100  # to propose what no trial had


def plan(sweeper: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What sweep.json keeps of the search: options and space, checked.

    Args:
        sweeper: `hydra.sweeper` as composed.
        overrides: as typed, Hydra's own left out.

    Raises:
        ConfigError, SeveralErrors: an option or a range means nothing.
    """
    options = checked_options(sweeper)
    return {
        "kind": NAME,
        "metric": options.metric,
        "direction": options.direction,
        "options": asdict(options),
        "space": read_space(overrides).to_plain(),
    }


def restore(sweep: Sweep) -> OptunaSearch:
    """The search of a sweep, with all that its journal knows."""
    options = OptunaSweeper(**sweep.search["options"])
    return OptunaSearch(sweep.folder, options, Space.from_plain(sweep.search["space"]))


class OptunaSearch:
    """Proposes trials by what earlier ones came to, and gives up poor ones.

    Optuna writes each event to the journal before it is acted on. A driver that is killed leaves at
    most one trial that was proposed and that nobody runs: it is proposed again, with its values.

    Args:
        folder: of the sweep.
    """

    def __init__(self, folder: Path, options: OptunaSweeper, space: Space) -> None:
        self._folder, self._options, self._space = folder, options, space
        self._study = open_study(folder, options.direction)
        self._unclaimed: list[int] = []  # Optuna's numbers of what was proposed and nobody runs
        self._seen: set[tuple[str, ...]] = set()  # overrides of every trial that there is

    def resume(self, trials: Sequence[Trial]) -> None:
        """Go on with the trials that there are.

        Raises:
            PosttrainError: the journal does not know one of them.
        """
        known = self._study.get_trials(deepcopy=False)
        numbers = {trial.extra[NUMBER] for trial in trials}
        unknown = numbers - {trial.number for trial in known}
        if unknown:
            raise PosttrainError(
                f"lacks {len(unknown)} of the trials in trials.jsonl",
                where=str(self._folder / FILE),
                fix="bring it back, or start a new sweep; the trials keep their run folders",
            )
        self._seen = {trial.overrides for trial in trials}
        self._unclaimed = [
            trial.number
            for trial in known
            if trial.state is TrialState.RUNNING and trial.number not in numbers
        ]

    # ------------------------------------------------------------------------------ proposals

    def ask(self, free: int) -> list[Proposal]:
        """Up to `free` new trials, and no more than n_jobs at a time."""
        at_once = self._options.n_jobs
        if at_once is None and free >= self._options.n_trials:
            at_once = QUEUED  # all of them at once would learn nothing from each other
        if at_once is not None:
            free = min(free, at_once - self._num_running())
        found: list[Proposal] = []
        while len(found) < free and not self.finished:
            proposal = self._propose()
            self._seen.add(proposal.overrides)
            found.append(proposal)
        return found

    @property
    def finished(self) -> bool:
        """Whether no more trials will come."""
        most = min(self._options.n_trials, self._space.size)
        return not self._unclaimed and len(self._seen) >= most

    def _num_running(self) -> int:
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return len(running) - len(self._unclaimed)

    def _propose(self) -> Proposal:
        """What no trial had: one of those left of a finite space where the sampler repeats."""
        for _ in range(ATTEMPTS):
            trial = self._begin()
            self._study.sampler = make_sampler(self._options, trial.number, "")
            _ = trial.relative_params  # of all keys together, drawn now, whichever are known
            values = {each.key: self._value(trial, each) for each in self._space.dimensions}
            overrides = self._space.overrides(values)
            if overrides not in self._seen:
                return Proposal(overrides, {NUMBER: trial.number})
            trial.set_user_attr(REPEATS, True)
            self._study.tell(trial, state=TrialState.FAIL)
        raise PosttrainError(
            f"proposed {ATTEMPTS} trials in a row that there are already",
            where=str(self._folder / FILE),
            fix="lower hydra.sweeper.n_trials, or widen the ranges",
        )

    def _begin(self) -> optuna.Trial:
        if self._unclaimed:
            number = self._unclaimed.pop(0)
            known = self._study.get_trials(deepcopy=False)[number]
            return optuna.trial.Trial(self._study, known._trial_id)
        newest = self._study.get_trials(deepcopy=False)[-1:]
        if self._space.size <= MOST_COMBINATIONS and any(REPEATS in t.user_attrs for t in newest):
            self._study.enqueue_trial(self._untried(newest[0].number))
        return self._study.ask()

    def _value(self, trial: optuna.Trial, each: Dimension) -> Any:
        """The value of one key: the journal's where it has one."""
        self._study.sampler = make_sampler(self._options, trial.number, each.key)
        if each.kind == "choice":
            return trial.suggest_categorical(each.key, each.values)
        if each.kind == "int":
            low, high, step = int(each.low), int(each.high), int(each.step or 1)
            return trial.suggest_int(each.key, low, high, step=step, log=each.log)
        return trial.suggest_float(each.key, each.low, each.high, step=each.step, log=each.log)

    def _untried(self, number: int) -> dict[str, Any]:
        """The values of a combination that no trial had, drawn by the seed."""
        dimensions = self._space.dimensions
        combinations = itertools.product(*(each.all_values() for each in dimensions))
        named = (dict(zip((d.key for d in dimensions), c, strict=True)) for c in combinations)
        left = [values for values in named if self._space.overrides(values) not in self._seen]
        return random.Random(f"{self._options.seed} {number}").choice(left)

    # -------------------------------------------------------------------------------- results

    def observe(self, trial: Trial, step: int, value: float) -> bool:
        """Take in a held-out value; whether the trial is to be given up.

        What was observed before is not counted twice, and what was decided stays so. The value
        before the first step is the base model's, and says nothing of a trial.
        """
        if self._options.pruner == "none" or step <= 0:
            return False
        known = self._frozen(trial)
        last = known.last_step or 0
        if known.state.is_finished() or step < last or PRUNED_AT in known.user_attrs:
            return bool(step >= known.user_attrs.get(PRUNED_AT, math.inf))
        handle = optuna.trial.Trial(self._study, known._trial_id)
        if step > last:
            handle.report(value, step)
        poor = is_poor(self._options, self._study, self._frozen(trial))
        if poor:
            handle.set_user_attr(PRUNED_AT, step)
        return poor

    def tell(self, trial: Trial, state: State, value: float | None) -> None:
        """Take in how a trial ended; one that failed and was started again may come to an end.

        Raises:
            PosttrainError: it ran to its end and did not measure what is searched for, nor will any
                other. Raised once: whoever goes on with the sweep has it run to its end.
        """
        known = self._frozen(trial)
        is_valued = state is State.done and value is not None and math.isfinite(value)
        if known.state is TrialState.FAIL and is_valued:
            self._add_retold(known, value)
        if known.state.is_finished():
            return
        if is_valued:
            self._study.tell(known.number, value)
        elif state is State.pruned:
            self._study.tell(known.number, state=TrialState.PRUNED)
        else:
            self._study.tell(known.number, state=TrialState.FAIL)
        if state is State.done and value is None:
            raise self._unmeasured(trial)

    def _unmeasured(self, trial: Trial) -> PosttrainError:
        rows = read_rows(trial.folder / "metrics.jsonl")
        keys = sorted({key for row in rows for key in row if key.startswith((TOTAL, CHANNEL))})
        fix = f"its runs have {', '.join(keys)}" if keys else "set data.eval or data.eval_fraction"
        what = f"trial {trial.number} ran to its end without a value of {self._options.metric}"
        return PosttrainError(what, where="hydra.sweeper.metric", fix=fix)

    def _add_retold(self, known: optuna.trial.FrozenTrial, value: float | None) -> None:
        trials = self._study.get_trials(deepcopy=False)
        if any(trial.user_attrs.get(RETOLD) == known.number for trial in trials):
            return
        self._study.add_trial(
            optuna.create_trial(
                value=value,
                params=known.params,
                distributions=known.distributions,
                user_attrs={RETOLD: known.number},
            )
        )

    def _frozen(self, trial: Trial) -> optuna.trial.FrozenTrial:
        found: optuna.trial.FrozenTrial = self._study.get_trials(deepcopy=False)[
            trial.extra[NUMBER]
        ]
        return found
