"""Rows of the embeddings, and of an untied head, for tokens that a run adds.

Each begins as the mean of all rows that tokens had (Hewitt 2021, "Initializing new word
embeddings"): to a head, a new token is then no likelier than the others are on average, and the
losses of the old tokens hardly change. A row far from the others, such as 0 beside rows with a
large mean, may be likelier than all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from posttrain_dist.errors import ConfigError
from posttrain_dist.models.tokenizer.new_tokens import grown_vocab_size

_KEY = "model.add_tokens"
_CHUNK = 8192  # rows that are added up at once


def added_token_ids(model: nn.Module) -> list[int]:
    """Ids of the tokens that were added to a loaded model; empty: none."""
    return list(getattr(model, "_added_token_ids", ()))


def add_rows(model: Any, ids: Sequence[int]) -> None:
    """Give the tokens `ids` rows that are the mean of those before the first of them.

    Called while the engine materialises the model: a sharded matrix is gathered, and the new one
    is whole on every rank, until the engine shards it.

    Args:
        model: a transformers `…ForCausalLM`.
        ids: consecutive, each behind those of all older tokens.

    Raises:
        ConfigError: the model has more tables of tokens than these.
    """
    if not ids:
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    config = model.config.get_text_config()
    size = grown_vocab_size(config.vocab_size, ids)
    if size > (getattr(config, "vocab_size_per_layer_input", None) or size):
        raise ConfigError(
            f"has no place in a {config.model_type}, whose layers have tables of tokens of their "
            "own",
            where=_KEY,
            fix="leave it out, and use tokens that the tokenizer has",
        )
    tied = head is not None and head.weight is embeddings.weight
    embeddings.weight = _grown(embeddings.weight, ids, size)
    embeddings.num_embeddings = size
    if head is not None:
        head.weight = embeddings.weight if tied else _grown(head.weight, ids, size)
        head.out_features = size
        if getattr(head, "bias", None) is not None:
            head.bias = _grown(head.bias, ids, size)
    config.vocab_size = size
    if hasattr(model, "vocab_size"):
        model.vocab_size = size
    model._added_token_ids = tuple(ids)


def refuse_untrained(model: Any) -> None:
    """See that the rows of added tokens are trained.

    Raises:
        ConfigError: nothing of the embeddings is.
    """
    ids = added_token_ids(model)
    embeddings = model.get_input_embeddings()
    if ids and not any(p.requires_grad for p in embeddings.parameters()):
        raise ConfigError(
            f"adds {len(ids)} tokens, and their embeddings would never be trained",
            where=_KEY,
            fix="use tuning=lora, which trains their rows alone, or tuning=full with a "
            "tuning.train that matches the embeddings",
        )


def _grown(old: torch.Tensor, ids: Sequence[int], size: int) -> nn.Parameter:
    """A matrix of `size` rows (or a vector): the old ones, and their mean for the rest of them."""
    with _whole(old), torch.no_grad():
        first = min(*ids, len(old))
        total = torch.zeros(old.shape[1:], dtype=torch.float64, device=old.device)
        for start in range(0, first, _CHUNK):
            total += old[start : min(start + _CHUNK, first)].double().sum(0)
        mean = (total / first).to(old.dtype)
        new = old.new_empty(size, *old.shape[1:])
        new[: len(old)] = old
        for start, end in ((len(old), size), (first, max(ids) + 1)):
            new[start:end] = mean
    return nn.Parameter(new, requires_grad=old.requires_grad)


def _whole(parameter: torch.Tensor) -> AbstractContextManager[Any]:
    """A context where a parameter that DeepSpeed shards can be read."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    zero: Any = sys.modules["deepspeed"].zero  # it sharded the parameter, so it is there
    return zero.GatheredParameters([parameter])  # type: ignore[no-any-return]
