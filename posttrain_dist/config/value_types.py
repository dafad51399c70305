"""Whether each value of a configuration is of its declared type; rules compare only what is."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Any

from posttrain_dist.errors import ConfigError, short

_PLAIN: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def type_problems(config: Any, key: str = "") -> list[ConfigError]:
    """Values of the wrong type, in a config that a Python program made.

    A flag is no number and a number no flag, though Python takes the one for the other.

    Args:
        config: a dataclass of the configuration.
        key: that it stands below.
    """
    try:
        kind: type = type(config)
        hints = _hints(kind)
    except NameError:  # of a class whose module cannot be found by its name: nothing is known
        return []
    found = []
    for field in dataclasses.fields(config):
        name = f"{key}.{field.name}" if key else field.name
        found += list(_problems(getattr(config, field.name), hints[field.name], name))
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def type_name(hint: Any) -> str:
    """A type in plain English: `int | None` is "a whole number or null"."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        names = [type_name(arg) for arg in inner if arg is not type(None)]
        return " or ".join([*names, "null"] if type(None) in inner else names)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(hint.__members__)
    if origin is list:
        return 'a list, such as \'["a", "b"]\''
    return _PLAIN.get(hint, str(hint))


def _problems(value: Any, hint: Any, key: str) -> Iterator[ConfigError]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, typing.cast("type", hint)):
        yield from type_problems(value, key)
    elif origin is dict and isinstance(value, dict):
        for name, each in value.items():
            yield from _problems(name, inner[0], f"{key}.{name}")
            yield from _problems(each, inner[1], f"{key}.{name}")
    elif origin is list and isinstance(value, list):
        for index, each in enumerate(value):
            yield from _problems(each, inner[0], f"{key}[{index}]")
    elif hint is not Any and not _is_of(value, hint):
        wanted = type_name(hint)
        fix = f"set {key} to {wanted}"
        if isinstance(hint, type) and issubclass(hint, Enum):
            fix = f"set it to {hint.__name__}.{next(iter(hint.__members__))} or another member"
        yield ConfigError(f"is {_shown(value)}, must be {wanted}", where=key, fix=fix)


def _is_of(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_of(value, arg) for arg in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else False


def _shown(value: Any) -> str:
    return short(value) if type(value) is int else repr(value)
