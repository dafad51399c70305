"""Every field of a configuration, with values that nobody can mean: each is refused by its key."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.config import GROUPS, SLOTS, DataConfig, RunConfig, Slurm, complete, type_name
from posttrain_dist.data import Source
from posttrain_dist.errors import PosttrainError, SeveralErrors

NOT_NUMBERS = [True, "3", b"3", [3], math.nan, math.inf, -math.inf, -1, -(10**30)]
ABSURD: dict[Any, list[Any]] = {
    int: [*NOT_NUMBERS, 1.5, 1e22, 10**22, 10**400],
    float: [*NOT_NUMBERS, 1e300, 10**22, 10**400],
    bool: [-1, 0, 1, 2, 1.0, "true", "yes"],
    str: [3, True, Path("/data"), ["a"]],
    list: ["a", [3], {"a": 1}],
    dict: ["a", [3]],
    Enum: ["auto", 0, True],
    Any: [3, True, [3], [""], "", [], {"a": 1}],  # text or texts: tuning.targets
}


def kinds(hint: Any) -> tuple[set[type], bool]:
    """The plain types that a hint is of, and whether null is one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        found = [kinds(arg) for arg in typing.get_args(hint) if arg is not type(None)]
        return set.union(*(each for each, _ in found)), type(None) in typing.get_args(hint)
    hint = typing.get_origin(hint) or hint
    return {Enum if isinstance(hint, type) and issubclass(hint, Enum) else hint}, False


def fields_of(owner: type, key: str) -> Iterator[tuple[type, str, str, Any]]:
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        name = f"{key}.{field.name}" if key else field.name
        hint = hints[field.name]
        if key or not dataclasses.is_dataclass(hint):
            yield owner, field.name, name, hint
        elif name not in SLOTS:
            yield from fields_of(hint, name)


def all_fields() -> list[tuple[type, str, str, Any]]:
    found = list(fields_of(RunConfig, ""))
    for group, options in SLOTS.items():
        for option in options.values():
            found += fields_of(option, group)
    return [*found, *fields_of(Source, "data.sources.a")]


FIELDS = all_fields()


def config_with(owner: type, name: str, key: str, value: Any) -> RunConfig:
    """A config that is the default but for one value."""
    if owner is RunConfig:
        return RunConfig(**{name: value})
    group = key.split(".")[0]
    if owner is Source:
        return RunConfig(data=DataConfig(sources={"a": Source(**{"path": "x", name: value})}))
    return RunConfig(**{group: owner(**{name: value})})


def places(config: RunConfig) -> list[str]:
    try:
        complete(config)
    except SeveralErrors as several:
        return [problem.where for problem in several.problems]
    except PosttrainError as error:
        return [error.where]
    return []


def test_the_fields_are_those_of_the_frozen_config():
    known = {key for _, _, key, _ in FIELDS}
    frozen = complete(RunConfig(cluster=Slurm())).to_dict()
    for group, value in frozen.items():
        names = {f"{group}.{n}" for n in value} if isinstance(value, dict) else {group}
        assert {name for name in names if not name.endswith(".kind")} <= known
    assert sum(1 for *_, hint in FIELDS if kinds(hint)[0] & {int, float}) >= 40
    assert set(GROUPS) - set(SLOTS) == {"hardware", "template"}


@pytest.mark.parametrize(("owner", "name", "key", "hint"), FIELDS, ids=[f[2] for f in FIELDS])
def test_a_value_that_nobody_means_is_refused_by_its_key(owner, name, key, hint):
    of, nullable = kinds(hint)
    values = [value for kind in of for value in ABSURD[kind]]
    if not nullable:
        values.append(None)
    taken = []
    for value in values:
        config = config_with(owner, name, key, value)
        found = places(config)
        if not any(place == key or place.startswith((f"{key}[", f"{key}.")) for place in found):
            taken.append(value)
    assert taken == []


def test_a_type_is_named_in_plain_english():
    hints = typing.get_type_hints(Slurm)
    assert type_name(hints["workers"]) == "a whole number or null"
    assert type_name(hints["cpus_per_worker"]) == "a number"


def test_a_path_of_python_is_told_to_be_text():
    with pytest.raises(PosttrainError) as refused:
        complete(RunConfig(data=DataConfig(train=Path("/data/x.jsonl"))))  # type: ignore[arg-type]
    assert str(refused.value) == (
        "data.train: is PosixPath('/data/x.jsonl'), must be text\n  fix: set data.train to text"
    )


@pytest.mark.parametrize(
    "change", [("offload: false", "offload: -1"), ("export: true", "export: 5")]
)
def test_a_frozen_file_makes_no_flag_of_a_number(change):
    from posttrain_dist.engine import DeepSpeed

    text = complete(RunConfig(engine=DeepSpeed(stage=1))).to_yaml()
    assert change[0] in text
    assert RunConfig.from_yaml(text).engine == DeepSpeed(stage=1)
    with pytest.raises(PosttrainError, match=change[1].split(":")[0]):
        RunConfig.from_yaml(text.replace(*change))
