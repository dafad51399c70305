"""One key and one value, tried against a typed config: unknown, misspelt, or of a wrong type."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain_dist.config import SLOTS, type_name
from posttrain_dist.errors import ConfigError
from posttrain_launch.compose.spellings import WITH_VALUE, foreign

# A group of keys -> the one that is meant where the group is given one value.
MAIN_KEYS = {"data": "data.train", "model": "model.path"}


def value_problems(
    base: DictConfig, key: str, value: Any, where: str | None = None
) -> list[ConfigError]:
    """What is wrong with `key=value`, given a composed config.

    Args:
        base: a config that composes, with the chosen options.
        key: dotted.
        value: a scalar, list, or dict of more keys.
        where: the place to name (`file:line: key`), if not the key itself.
    """
    place = where or key
    *parents, leaf = key.split(".")
    node: Any = base
    for part in parents:
        if _takes_any_key(node) and part not in node:
            return []  # below a name of the user's own
        node = node.get(part) if isinstance(node, DictConfig) and part in node else None
    if not isinstance(node, DictConfig) or (leaf not in node and not _takes_any_key(node)):
        named = leaf.lower().replace("-", "_") in WITH_VALUE
        typed = str(value) if named and isinstance(value, str | int) else None
        return [ConfigError("unknown key", where=place, fix=unknown_key_fix(base, key, typed))]
    target = node.get(leaf) if leaf in node else None
    if isinstance(target, DictConfig):
        if isinstance(value, dict):
            return [
                p
                for name, v in value.items()
                for p in value_problems(
                    base, f"{key}.{name}", v, f"{where}.{name}" if where else None
                )
            ]
        if isinstance(value, str) and key in MAIN_KEYS:
            fix = f"write {MAIN_KEYS[key]}={value}"
            return [ConfigError("is a group of keys, not one value", where=place, fix=fix)]
        names = ", ".join(f"{key}.{name!s}" for name in target)
        fix = f"set one of its keys: {names}" if names else f"choose an option: {key}=<option>"
        if _takes_any_key(target):
            fix = f"give it as names and values: '{key}={{{value}: ...}}'"
        return [ConfigError(f"is a group of keys, not one value ({value!r})", where=place, fix=fix)]
    hint = _hint(node, leaf)
    try:
        fits = not (hint is bool and is_number(value))
        OmegaConf.update(copy.deepcopy(base), key, value)
    except OmegaConfBaseException:
        fits = False
    if fits:
        return []
    if isinstance(value, list) and key in ("data.train", "data.eval"):
        what = "is one place, and several were given"
        fix = f"set {key} to a folder or a glob in quotes ('/data/*.jsonl'), or use data.sources"
        return [ConfigError(what, where=place, fix=fix)]
    wanted, shown = type_name(hint), "null" if value is None else repr(value)
    return [ConfigError(f"{shown} is not {wanted}", where=place, fix=f"set {key} to {wanted}")]


def _takes_any_key(node: Any) -> bool:
    """Whether a node is a dict of the config, whose names are the user's own."""
    return isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict


def is_number(value: Any) -> bool:
    """Whether it is no true or false, of which OmegaConf would make one all the same."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_flag(base: DictConfig, key: str) -> bool:
    """Whether a key of a composed config takes true or false."""
    *parents, leaf = key.split(".")
    node: Any = base
    for part in parents:
        node = node.get(part) if isinstance(node, DictConfig) and part in node else None
    return isinstance(node, DictConfig) and leaf in node and _hint(node, leaf) is bool


def number_type(base: DictConfig, key: str) -> type | None:
    """int or float where a key of a composed config takes numbers; else None."""
    *parents, leaf = key.split(".")
    node: Any = base
    for part in parents:
        node = node.get(part) if isinstance(node, DictConfig) and part in node else None
    if not isinstance(node, DictConfig) or leaf not in node:
        return None
    hint = _hint(node, leaf)
    kinds = {each for each in typing.get_args(hint) or (hint,) if each is not type(None)}
    return kinds.pop() if kinds in ({int}, {float}) else None


# ----------------------------------------------------------------------------- unknown keys


def unknown_key_fix(base: DictConfig, key: str, value: str | None = None) -> str:
    """What to write instead of a key that is not there; `value` is written behind the key."""
    owners = _owners(key)
    if owners:
        return f"this key belongs to {owners}: choose that, or leave the key out"
    known = foreign(key, value)
    if known is not None:
        return known
    near = nearest_key(base, key)
    if near is not None:
        return f"did you mean {near}{'' if value is None else f'={value}'}?"
    return "posttrain train --cfg job lists every key"


def _owners(key: str) -> str:
    """The options of a slot that have this key, where the chosen one has not."""
    group, _, name = key.partition(".")
    kinds = [
        kind
        for kind, option in SLOTS.get(group, {}).items()
        if name in {f.name for f in dataclasses.fields(option)}
    ]
    shown = ["zero0 to zero3_offload" if kind == "deepspeed" else kind for kind in kinds]
    return " or ".join(f"{group}={kind}" for kind in shown)


def nearest_key(base: DictConfig, key: str) -> str | None:
    """The valid key that was most likely meant."""
    keys = list(_dotted(base))
    keys += [k for k in _slot_keys() if k not in keys]
    leaf = key.rsplit(".", 1)[-1]
    same = [k for k in keys if k.rsplit(".", 1)[-1] == leaf]
    if same:
        return max(same, key=lambda k: difflib.SequenceMatcher(None, k, key).ratio())
    # The name of the group, which is right, makes any two of its keys alike.
    near = [
        k
        for k in difflib.get_close_matches(key, keys, n=3, cutoff=0.7)
        if difflib.SequenceMatcher(None, k.rsplit(".", 1)[-1], leaf).ratio() >= 0.6
    ]
    if not near:
        leaves = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
        near = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    return near[0] if near else None


def has_key(base: DictConfig, key: str) -> bool:
    """Whether a composed config, or another option of one of its slots, has a dotted key."""
    node: Any = base
    for part in key.split("."):
        if _takes_any_key(node):
            return True
        node = node.get(part) if isinstance(node, DictConfig) and part in node else None
    return _takes_any_key(node) or key in _dotted(base) or key in _slot_keys()


def _dotted(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, node):
        value = node.get(name)
        if isinstance(value, DictConfig):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _slot_keys() -> Iterator[str]:
    for group, options in SLOTS.items():
        for option in options.values():
            yield from (f"{group}.{f.name}" for f in dataclasses.fields(option))


# ------------------------------------------------------------------------------ wrong types


def _hint(node: DictConfig, leaf: str) -> Any:
    owner = OmegaConf.get_type(node)
    if owner is dict:
        return node._metadata.element_type
    return typing.get_type_hints(owner).get(leaf, str) if owner is not None else str
