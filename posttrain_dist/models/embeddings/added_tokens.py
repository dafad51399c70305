"""Rows of the embeddings, and of an untied head, for tokens that a run adds.

Each begins as the mean of all rows that tokens had (Hewitt 2021, "Initializing new word
embeddings"): to a head, a new token is then no likelier than the others are on average, and the
losses of the old tokens hardly change. A row far from the others, such as 0 beside rows with a
large mean, may be likelier than all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from posttrain_dist.errors import ConfigError
from posttrain_dist.models.tokenizer.new_tokens import grown_vocab_size

# Of trained rows, in the module whose matrix they are in.
ADAPTER, ROWS, IDS = "token_adapter", "trainable_tokens_delta", "token_ids"
_KEY = "model.add_tokens"
_CHUNK = 8192  # rows that are added up at once


def added_token_ids(model: nn.Module) -> list[int]:
    """Ids of the tokens that were added to a loaded model; empty: none."""
    return list(getattr(model, "_added_token_ids", ()))


def forget_added(model: nn.Module) -> None:
    """Have a loaded model's new rows taken for those of any other token."""
    model._added_token_ids = ()  # type: ignore[assignment]


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


# ------------------------------------------------------------------ trained beside frozen weights


class TrainedRows(nn.Module):
    """The rows of some tokens, which take the place of those in a frozen matrix.

    What reads the matrix calls this module inside, with its own values (to which the hooks of
    ZeRO-3 are tied), and is handed the rows. Names are those of `peft`'s trainable tokens.
    """

    def __init__(self, rows_KD: torch.Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.Parameter(rows_KD)  # whole rows, whatever it is called
        self.register_buffer(IDS, torch.tensor(ids, device=rows_KD.device))

    def forward(
        self, values: torch.Tensor, operation: Callable[[torch.Tensor, torch.Tensor], Any]
    ) -> Any:
        """`operation(rows_KD, ids_K)` while the rows are here."""
        return operation(self.trainable_tokens_delta, self.token_ids)  # type: ignore[arg-type]


def train_added_rows(model: Any, in_full: Callable[[str], bool]) -> None:
    """Train the rows of added tokens, where embeddings and head are frozen otherwise.

    A tied head reads those of the embeddings; see models/head.py for the head.

    Args:
        in_full: whether the parameter of a name is trained as a whole.

    Raises:
        ConfigError: the head is a target of the tuning.
    """
    ids = added_token_ids(model)
    if not ids:
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ConfigError(
            "adds tokens, whose rows of the head are trained, and the head is a target itself",
            where=_KEY,
            fix="leave the head out of tuning.targets, or add no tokens",
        )
    names = {module: name for name, module in model.named_modules()}
    tied = head is not None and head.weight is embeddings.weight
    for module in (embeddings, *([] if tied or head is None else [head])):
        if not in_full(f"{names[module]}.weight"):
            with _whole(module.weight):
                rows_KD = module.weight.detach()[ids].clone()
            module.add_module(ADAPTER, TrainedRows(rows_KD, ids))
    if hasattr(embeddings, ADAPTER):
        embeddings.__class__ = type(
            f"Grown{type(embeddings).__name__}",
            (type(embeddings),),
            {"forward": _embed(type(embeddings))},
        )
        if tied:
            head.add_module(ADAPTER, embeddings.token_adapter)


def _embed(base: Any) -> Callable[..., torch.Tensor]:
    def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
        embeds: torch.Tensor = base.forward(self, ids)

        def replace(rows_KD: torch.Tensor, ids_K: torch.Tensor) -> torch.Tensor:
            place = ids - ids_K[0]
            new = (place >= 0) & (place < len(ids_K))
            # Some models (Gemma 3) multiply embeddings in their module.
            rows = nn.functional.embedding(place.clamp(0, len(ids_K) - 1), rows_KD)
            rows = rows * getattr(self, "embed_scale", 1.0)
            return torch.where(new[..., None], rows.to(embeds.dtype), embeds)

        replaced: torch.Tensor = self.token_adapter(embeds, replace)
        return replaced

    return forward


def with_rows(weight_VD: torch.Tensor, rows_KD: torch.Tensor, ids_K: torch.Tensor) -> torch.Tensor:
    """The frozen matrix with trained rows in it; the gradient goes to them."""
    return weight_VD.index_copy(0, ids_K, rows_KD.to(weight_VD.dtype))


def merged_rows(
    name: str, weight: torch.Tensor, kept: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """A tensor of the base model with the rows that were trained; None: it has none.

    Args:
        name: in the model: the weight of the embeddings or of the head, or a bias of the head.
        weight: with the rows that the base model has.
        kept: what the checkpoints of the tuning hold.
    """
    module, _, leaf = name.rpartition(".")
    rows_KD, ids_K = (kept.get(f"{module}.{ADAPTER}.{part}") for part in (ROWS, IDS))
    if rows_KD is None or ids_K is None:
        return None
    ids = ids_K.tolist()
    grown = _with_mean(weight, ids, grown_vocab_size(len(weight), ids))
    if leaf == "weight":
        grown[ids] = rows_KD.to(grown)
    return grown


def _grown(old: torch.Tensor, ids: Sequence[int], size: int) -> nn.Parameter:
    with _whole(old), torch.no_grad():
        return nn.Parameter(_with_mean(old, ids, size), requires_grad=old.requires_grad)


def _with_mean(old: torch.Tensor, ids: Sequence[int], size: int) -> torch.Tensor:
    """A matrix of `size` rows (or a vector): the old ones, and their mean for the rest of them."""
    first = min(*ids, len(old))
    total = torch.zeros(old.shape[1:], dtype=torch.float64, device=old.device)
    for start in range(0, first, _CHUNK):
        total += old[start : min(start + _CHUNK, first)].double().sum(0)
    mean = (total / first).to(old.dtype)
    new = old.new_empty(size, *old.shape[1:])
    new[: len(old)] = old
    for start, end in ((len(old), size), (first, max(ids) + 1)):
        new[start:end] = mean
    return new


def _whole(parameter: torch.Tensor) -> AbstractContextManager[Any]:
    """A context where a parameter that DeepSpeed shards can be read."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    zero: Any = sys.modules["deepspeed"].zero  # it sharded the parameter, so it is there
    return zero.GatheredParameters([parameter])  # type: ignore[no-any-return]
