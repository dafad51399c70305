"""How long a row may be: learned positions end, and some RoPE changes with the longest sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from posttrain_dist.errors import ConfigError
from posttrain_dist.models.architectures.defaults import completed
from posttrain_dist.models.architectures.known import LEARNED_POSITIONS
from posttrain_dist.models.architectures.rope_values import rope_kind


def check_row_length(config: Mapping[str, Any], max_length: int, virtual_tokens: int = 0) -> None:
    """Refuse rows for which the model has no positions, or not the same ones in every pack.

    Args:
        config: what config.json of the model holds.
        max_length: tokens of a packed row at most, `data.max_length`.
        virtual_tokens: of the tuning, which stand before each sample.

    Raises:
        ConfigError: they are above what the model allows.
    """
    limits = sorted(_limits(config))
    sizes = [limit for limit, _ in limits] + [config.get("max_position_embeddings")]
    context = min((size for size in sizes if isinstance(size, int)), default=None)
    if virtual_tokens and context is not None and virtual_tokens >= context:
        raise ConfigError(
            f"is {virtual_tokens}, and the context of the model is {context} tokens: there is no "
            "room for a sample",
            where="tuning.tokens",
            fix=f"set tuning.tokens far below {context}",
        )
    if limits and max_length + virtual_tokens > limits[0][0]:
        limit, why = limits[0]
        plus = f", with tuning.tokens {max_length + virtual_tokens}" if virtual_tokens else ""
        raise ConfigError(
            f"is {max_length}{plus}, and {why}",
            where="data.max_length",
            fix=f"set data.max_length={limit - virtual_tokens} or less",
        )


def check_planned_length(config: Mapping[str, Any], longest: int) -> None:
    """Refuse a sample that is longer than the context of the model.

    Args:
        config: what config.json of the model holds.
        longest: tokens of the longest sample that may come.

    Raises:
        ConfigError: it is above what the model allows.
    """
    context = config.get("max_position_embeddings")
    if isinstance(context, int) and longest > context:
        raise ConfigError(
            f"lets through samples of {longest} tokens, and the model has {context} positions",
            where="data.max_length",
            fix=f"set data.max_length={context} or less",
        )


def learned_positions(config: Mapping[str, Any]) -> int | None:
    """How many positions a model has learned, tokens of a sample at most; None: any, by rule."""
    if config.get("model_type") not in LEARNED_POSITIONS:
        return None
    size = completed(config).get("max_position_embeddings")
    return size if isinstance(size, int) else None


def _limits(config: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """(tokens, what is at that length)."""
    if size := learned_positions(config):
        yield size, f"the model has learned {size} positions"
    for rope in _ropes(config):
        kind = rope_kind(rope, config.get("model_type"))
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
