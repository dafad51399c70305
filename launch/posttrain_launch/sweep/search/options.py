"""Options of `hydra/sweeper=posttrain_optuna`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hydra.core.config_store import ConfigStore

from posttrain_dist.errors import ConfigError, Rule, at_least, raise_all

NAME = "posttrain_optuna"
SAMPLERS, PRUNERS = ("tpe", "random"), ("none", "median", "asha")
TOTAL, CHANNEL = "eval/loss", "eval_channel_loss/"


@dataclass(slots=True)
class OptunaSweeper:
    """`hydra.sweeper.*` of a search."""

    n_trials: int = 20  # at most; fewer where there are fewer combinations
    n_jobs: int | None = None  # trials at a time; null: what the launcher has room for, or 4
    metric: str = TOTAL  # or eval_channel_loss/<channel>, a key of metrics.jsonl
    direction: str = "minimize"  # or maximize
    sampler: str = "tpe"  # or random
    pruner: str = "none"  # median: worse than half of those before it; asha: not among the best
    seed: int = 0  # of the proposals; the training has its own
    startup_trials: int = 5  # random ones before tpe, and finished ones before median
    warmup_steps: int = 0  # optimizer steps before which nothing is pruned
    reduction: int = 3  # asha: one in so many goes on at each rung, to so many times the steps


def register_sweepers() -> None:
    """Give Hydra the options."""
    store = ConfigStore.instance()
    store.store(group="hydra/sweeper", name=NAME, node=OptunaSweeper, provider="posttrain")


def checked_options(values: Mapping[str, Any]) -> OptunaSweeper:
    """The options of `hydra.sweeper`.

    Raises:
        ConfigError, SeveralErrors: one of them has a value that means nothing.
    """
    known = {field.name for field in fields(OptunaSweeper)}
    options = OptunaSweeper(**{str(k): v for k, v in values.items() if k in known})
    metric = options.metric
    rules = [
        _one_of("sampler", options.sampler, SAMPLERS),
        _one_of("pruner", options.pruner, PRUNERS),
        _one_of("direction", options.direction, ("minimize", "maximize")),
        Rule(
            metric == TOTAL or (metric.startswith("eval_") and bool(metric.partition("/")[2])),
            "hydra.sweeper.metric",
            f"is {metric}, which is no held-out value",
            f"use {TOTAL}, {CHANNEL}<channel> for one channel, or of an objective that compares "
            "answers eval_dpo/accuracy, with hydra.sweeper.direction=maximize",
        ),
        at_least("hydra.sweeper.n_trials", options.n_trials, most=100_000),
        at_least("hydra.sweeper.n_jobs", options.n_jobs),
        at_least("hydra.sweeper.seed", options.seed, 0),
        at_least("hydra.sweeper.startup_trials", options.startup_trials),
        at_least("hydra.sweeper.warmup_steps", options.warmup_steps, 0),
        at_least("hydra.sweeper.reduction", options.reduction, 2),
    ]
    raise_all([rule.error() for rule in rules if not rule.holds])
    return options


def _one_of(name: str, value: str, names: tuple[str, ...]) -> Rule:
    fix = f"use one of: {', '.join(names)}"
    return Rule(value in names, f"hydra.sweeper.{name}", f"there is no {value}", fix)


def without_optuna() -> ConfigError:
    """The error where the package is missing."""
    return ConfigError(
        "needs the package optuna, which is not installed",
        where=f"hydra/sweeper={NAME}",
        fix="pip install 'posttrain-dist[search]'",
    )
