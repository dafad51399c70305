"""Words of a command line, applied to a RunConfig without Hydra: what a fallback changes.

Only what the planner itself proposes: `group=option` of tuning, engine and cluster, and values.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import yaml

from posttrain_dist.config import (
    DeepSpeed,
    Full,
    Local,
    Lora,
    Quantize,
    Ray,
    RunConfig,
    Single,
    Slurm,
)
from posttrain_dist.models import Checkpointing, ModelConfig

# As the files of conf/ have them; tests/planner/test_overriding.py compares the two.
OPTIONS: dict[str, dict[str, Callable[[], Any]]] = {
    "tuning": {
        "full": Full,
        "lora": Lora,
        "qlora": lambda: Lora(quantize=Quantize.nf4),
    },
    "engine": {
        "single": Single,
        "zero0": lambda: DeepSpeed(stage=0),
        "zero1": lambda: DeepSpeed(stage=1),
        "zero2": lambda: DeepSpeed(stage=2),
        "zero3": lambda: DeepSpeed(stage=3),
        "zero3_offload": lambda: DeepSpeed(stage=3, offload=True),
    },
    "cluster": {"local": Local, "ray": Ray, "slurm": Slurm},
}


def with_words(config: RunConfig, words: Iterable[str]) -> RunConfig:
    """The config with each `group=option`, then each `group.key=value`.

    Only selective checkpointing has a number of layers: another mode takes it away.
    """
    given = [word.partition("=")[::2] for word in words]
    for group, option in given:
        if "." not in group:
            config = dataclasses.replace(config, **{group: OPTIONS[group][option]()})
    for key, text in given:
        group, dot, name = key.partition(".")
        if dot:
            old = getattr(config, group)
            new = dataclasses.replace(old, **{name: _value(getattr(old, name), text)})
            config = dataclasses.replace(config, **{group: _consistent(new)})
    return config


def _value(old: Any, text: str) -> Any:
    if isinstance(old, Enum):
        return type(old)[text]
    for read in (int, float):  # YAML takes 1e-05 for text
        with contextlib.suppress(ValueError):
            return read(text)
    return yaml.safe_load(text)


def _consistent(group: Any) -> Any:
    if not isinstance(group, ModelConfig):
        return group
    if group.activation_checkpointing is Checkpointing.selective:
        return group
    return dataclasses.replace(group, checkpoint_layers=None)
