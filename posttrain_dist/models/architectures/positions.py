"""How long a row may be: learned positions end, and some RoPE changes with the longest sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from posttrain_dist.errors import ConfigError
from posttrain_dist.models.architectures.known import LEARNED_POSITIONS


def check_row_length(config: Mapping[str, Any], max_length: int) -> None:
    """Refuse rows for which the model has no positions, or not the same ones in every pack.

    Args:
        config: what config.json of the model holds.
        max_length: tokens of a packed row at most, `data.max_length`.

    Raises:
        ConfigError: it is above what the model allows.
    """
    limits = sorted(_limits(config))
    if limits and max_length > limits[0][0]:
        limit, why = limits[0]
        raise ConfigError(
            f"is {max_length}, and {why}",
            where="data.max_length",
            fix=f"set data.max_length={limit} or less",
        )


def learned_positions(config: Mapping[str, Any]) -> int | None:
    """How many positions a model has learned, tokens of a sample at most; None: any, by rule."""
    size = config.get(LEARNED_POSITIONS.get(str(config.get("model_type")), ""))
    return size if isinstance(size, int) else None


def _limits(config: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """(tokens, what is at that length)."""
    if size := learned_positions(config):
        yield size, f"the model has learned {size} positions"
    for rope in _ropes(config):
        kind = rope.get("rope_type") or rope.get("type")
        given = rope.get("original_max_position_embeddings")
        longest = config.get("max_position_embeddings")
        if kind == "longrope":
            longest = given or config.get("original_max_position_embeddings") or longest
        if kind in ("longrope", "dynamic") and isinstance(longest, int):
            yield (
                longest,
                f"above {longest} tokens this model's {kind} positions change with the longest "
                "sample of a pack, for all samples in it",
            )


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Settings of RoPE; there may be one for each kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if isinstance(found, Mapping):
            yield found
            yield from (each for each in found.values() if isinstance(each, Mapping))
