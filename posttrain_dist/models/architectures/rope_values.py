"""Settings of rotary positions in a config.json that no training could use. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

# What each kind cannot do without.
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
_POSITIVE = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"),
    *("beta_fast", "beta_slow", "partial_rotary_factor", "original_max_position_embeddings"),
)
_BESIDE = ("rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct")
_LISTS = ("short_factor", "long_factor")
_GROUPS = ("rope_parameters", "rope_scaling")


def rope_faults(config: Mapping[str, Any], head_dim: int) -> Iterator[str]:
    """What is wrong, a sentence each.

    Args:
        head_dim: of the part of a head that may be rotated.
    """
    for name in (*_BESIDE, "partial_rotary_factor"):
        if config.get(name) is not None and not _is_positive(config[name]):
            yield f"{name} is {config[name]!r}, not a number above 0"
    for group in _GROUPS:
        found = config.get(group)
        if found is None:
            continue
        if not isinstance(found, Mapping):
            yield f"{group} is {found!r}, not settings such as {{'rope_type': 'default'}}"
            continue
        nested = {key: value for key, value in found.items() if isinstance(value, Mapping)}
        for key, rope in nested.items() if nested else [("", found)]:
            where = f"{group}.{key}" if key else group
            yield from _settings_faults(rope, where, config, head_dim)


def rope_kind(rope: Mapping[str, Any], model_type: Any) -> Any:
    """The kind of rotary positions; Phi 3 has others names for one of them."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    return "longrope" if model_type == "phi3" and kind in ("su", "yarn") else kind


def _settings_faults(
    rope: Mapping[str, Any], where: str, config: Mapping[str, Any], head_dim: int
) -> Iterator[str]:
    kind = rope_kind(rope, config.get("model_type"))
    if not isinstance(kind, str) or kind not in ROPE_NEEDS:
        yield f"{where} is of the type {kind!r}; there are {', '.join(ROPE_NEEDS)}"
        return
    for name in ROPE_NEEDS[kind]:
        if rope.get(name) is None:
            yield f"{where} of the type {kind} has no {name}"
    for name in _POSITIVE:
        if rope.get(name) is not None and not _is_positive(rope[name]):
            yield f"{where}.{name} is {rope[name]!r}, not a number above 0"
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if kind == "llama3" and _is_positive(low) and _is_positive(high) and low == high:
        yield f"{where}.low_freq_factor is {low}, as high_freq_factor is: there is nothing between"
    rotated = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if kind == "longrope" and _is_positive(rotated):
        yield from _list_faults(rope, where, int(head_dim * rotated) // 2)


def _list_faults(rope: Mapping[str, Any], where: str, size: int) -> Iterator[str]:
    for name in _LISTS:
        found = rope.get(name)
        if found is None:
            continue
        if not isinstance(found, list) or not all(map(_is_positive, found)):
            yield f"{where}.{name} is not a list of numbers above 0"
        elif len(found) != size:
            yield f"{where}.{name} has {len(found)} numbers, and a head rotates {size} pairs"


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
