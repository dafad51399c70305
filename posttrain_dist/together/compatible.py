"""Which runs can be trained together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain_dist.config import Local, Lora, RunConfig, Single
from posttrain_dist.errors import ConfigError, Rule
from posttrain_dist.flow import By
from posttrain_dist.tuning.lora import LoraInit

# What each run has of its own; groups, or keys of the group `tuning`.
OWN_GROUPS = ("name", "optimizer", "logging", "checkpoint", "diagnose", "output_root", "hardware")
OWN_TUNING = ("rank", "alpha", "rslora", "dora", "lr_ratio_b", "freeze_a", "init_from")
ONE_BY_ONE = "train these runs one by one (hydra/launcher=basic)"


def check_together(configs: Sequence[RunConfig]) -> None:
    """See that runs can share a base and the rows of each step.

    Raises:
        ConfigError: the first thing that stands against it, by its key.
    """
    for config in configs:
        for rule in _rules(config):
            if not rule.holds:
                raise rule.error()
    first = _shared_values(configs[0])
    for config in configs[1:]:
        other = _shared_values(config)
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise ConfigError(
                    f"is {first.get(key)!r} in one run and {other.get(key)!r} in another, and runs "
                    "that train together have the same data, steps and base",
                    where=key,
                    fix=ONE_BY_ONE,
                )


def _rules(config: RunConfig) -> list[Rule]:
    tuning = config.tuning
    is_lora = isinstance(tuning, Lora)
    values: list[tuple[str, Any, bool]] = [
        ("engine", type(config.engine).__name__.lower(), isinstance(config.engine, Single)),
        ("cluster", type(config.cluster).__name__.lower(), isinstance(config.cluster, Local)),
        ("tuning", type(tuning).__name__.lower(), is_lora),
        ("train.neftune_alpha", config.train.neftune_alpha, not config.train.neftune_alpha),
        ("model.compile", config.model.compile, not config.model.compile),
        ("model.add_tokens", config.model.add_tokens, not config.model.add_tokens),
    ]
    needed = [field.name for field in config.objective.extra if field.by is By.model]
    values.append(
        ("objective", config.objective.name, not needed and not config.objective.own_rows)
    )
    if isinstance(tuning, Lora):
        values += [
            ("tuning.dropout", tuning.dropout, not tuning.dropout),
            ("tuning.init", tuning.init.name, tuning.init is LoraInit.zero_b),
            ("tuning.modules_to_save", tuning.modules_to_save, not tuning.modules_to_save),
        ]
    wanted = {
        "engine": "single",
        "cluster": "local",
        "tuning": "lora",
        "tuning.init": "zero_b",
        "model.compile": "false",
        "objective": "one that needs no reference",
    }
    return [
        Rule(
            holds,
            key,
            f"is {value!r}, and runs that train together in one process have "
            f"{wanted.get(key, 'none')}",
            ONE_BY_ONE,
        )
        for key, value, holds in values
    ]


def _shared_values(config: RunConfig) -> dict[str, Any]:
    """Every key that the runs must agree in, with its value."""
    found: dict[str, Any] = {}
    for group, values in config.to_dict().items():
        if group in OWN_GROUPS:
            continue
        if not isinstance(values, dict):
            found[group] = values
            continue
        for key, value in values.items():
            if group != "tuning" or key not in OWN_TUNING:
                found[f"{group}.{key}"] = value
    return found
