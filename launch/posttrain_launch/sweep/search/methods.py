"""Samplers and pruners of Optuna by the names that hydra.sweeper has for them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import optuna
from optuna.pruners import MedianPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from posttrain_launch.sweep.search.options import OptunaSweeper


def make_sampler(options: OptunaSweeper, number: int, key: str) -> BaseSampler:
    """The sampler of one value of one trial.

    Each has a seed of its own, so that a proposal depends on what is known and on nothing that a
    killed driver had in memory: a search that goes on does not draw its first trials once more.
    """
    text = f"{options.seed} {number} {key}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    if options.sampler == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, n_startup_trials=options.startup_trials)


def is_poor(options: OptunaSweeper, study: optuna.Study, trial: FrozenTrial) -> bool:
    """Whether a trial is to be given up after its newest held-out value."""
    if options.pruner == "none" or trial.last_step is None:
        return False
    if math.isnan(trial.intermediate_values[trial.last_step]):
        return trial.last_step >= options.warmup_steps
    if options.pruner == "median":
        return bool(MedianPruner(options.startup_trials, options.warmup_steps).prune(study, trial))
    known = study.get_trials(deepcopy=False)
    curves = [each.intermediate_values for each in known if each.number != trial.number]
    own = trial.intermediate_values
    first = options.warmup_steps or min(step for curve in (*curves, own) for step in curve)
    sign = 1 if options.direction == "minimize" else -1
    return not is_promoted(own, curves, first, options.reduction, sign)


def is_promoted(
    own: Mapping[int, float],
    others: Iterable[Mapping[int, float]],
    first_rung: int,
    reduction: int,
    sign: int = 1,
) -> bool:
    """ASHA: whether a trial goes on behind the rungs that its newest value reaches.

    Rung k lies at `first_rung * reduction**k` steps, and the value of a trial there is its first
    one at or behind it. One in `reduction` of those that came there goes on, at least one. Optuna's
    own pruner keeps what it decided as it goes; this one follows from the values alone, so that a
    driver which was killed before it acted decides the same.

    Args:
        own: step -> value of the trial, and `others` those of the other trials.
        sign: 1 where small values are good, -1 where large ones are.

    Reference: Li et al. 2020, arXiv:1810.05934.
    """
    step = max(own)
    before = max((each for each in own if each < step), default=0)
    curves = list(others)
    rung = first_rung
    while rung <= step:
        if rung > before:
            rivals = [value for curve in curves if (value := _at_rung(curve, rung)) is not None]
            better = sum(sign * rival < sign * own[step] for rival in rivals)
            if better >= max(1, (len(rivals) + 1) // reduction):
                return False
        rung *= reduction
    return True


def _at_rung(curve: Mapping[int, float], rung: int) -> float | None:
    """The value at a rung; None: the trial did not come there, or to no number."""
    step = min((step for step in curve if step >= rung), default=None)
    return None if step is None or math.isnan(curve[step]) else curve[step]
