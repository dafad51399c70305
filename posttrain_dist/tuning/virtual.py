"""Virtual tokens in a packed row: trained vectors that stand before every sample.

    insert_virtual_tokens   the row with places for them, once for each prompt of an ensemble
    prepend                 its embeddings, trained vectors in these places
    whole                   parameters that ZeRO-3 holds in shards, whole while a tuning reads them

Legend beside that of flow.py: R roots of the row, P all trained vectors, V virtual places in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import ConfigError, ModelError, Rule
from posttrain_dist.tuning.base import AdapterTuning, SavedAdapter, virtual_tokens_rule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn

    from posttrain_dist.flow import Batch

EMBEDDINGS = "prompt_embeddings"  # the one tensor of a PEFT folder of a prompt or prefix


@dataclass(kw_only=True, slots=True)
class VirtualTuning(AdapterTuning):
    """`tokens` trained vectors, which every sample sees before its own tokens."""

    tokens: int = 20

    @property
    def virtual_tokens(self) -> int:
        """How many positions they take."""
        return self.tokens

    @property
    def unmergeable(self) -> str:
        """Always: they are input of the model."""
        return "virtual tokens are input of the model, which none of its weights can take in"

    @property
    def begins_as_base(self) -> bool:
        """Never: attention sees them from the first step on."""
        return False

    def rules(self) -> list[Rule]:
        """Ranges; the context of the model is compared when its config.json is read."""
        return [virtual_tokens_rule(self.tokens)]

    def decays(self, name: str, shape: Sequence[int]) -> bool:
        """Never: the vectors are input, and 0 is no better input than another."""
        return False

    def insert(self, model: nn.Module) -> None:
        """Put the module of the trained vectors on the model."""
        raise NotImplementedError


# --------------------------------------------------------------------------------- packed rows


def insert_virtual_tokens(batch: Batch, num: int, copies: int = 1) -> Batch:
    """`num` virtual tokens before each root of the row; samples with a parent follow its own.

    With `copies`, the whole row stands there as often, one after the other, each time with virtual
    tokens of its own: `supervised_N` then names the rows of each in turn. Token j of copy e has
    the id -1 - (e · num + j), which no embedding has. Positions count from the virtual tokens on.
    """
    import torch

    cu_seqlens_S = [0]
    shifts: list[int] = []  # of each real token
    places: list[int] = []  # of the virtual ones
    for (start, end), parent in zip(pairwise(batch.cu_seqlens_S), batch.parent_S, strict=True):
        if parent < 0:
            places += range(cu_seqlens_S[-1], cu_seqlens_S[-1] + num)
        shifts += [len(places)] * (end - start)
        cu_seqlens_S.append(end + len(places))
    device = batch.input_ids_T.device
    shift_T = torch.tensor(shifts).to(device, non_blocking=True)
    place_T = torch.arange(len(shifts), device=device) + shift_T
    place_V = torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True)
    virtual_V = torch.arange(num, device=device).repeat(len(places) // num if num else 0)

    def merged(real_T: torch.Tensor, virtual_V: torch.Tensor) -> torch.Tensor:
        row = real_T.new_empty(cu_seqlens_S[-1])
        return row.index_copy_(0, place_T, real_T).index_copy_(0, place_V, virtual_V)

    row = replace(
        batch,
        input_ids_T=merged(batch.input_ids_T, -1 - virtual_V),
        position_ids_T=merged(batch.position_ids_T + num, virtual_V),
        cu_seqlens_S=cu_seqlens_S,
        bounds_S=torch.tensor(cu_seqlens_S, dtype=torch.int32).to(device, non_blocking=True),
        max_seqlen=max(end - start for start, end in pairwise(cu_seqlens_S)),
        supervised_N=batch.supervised_N + shift_T[batch.supervised_N],
    )
    return row if copies == 1 else repeated(row, copies, num)


def repeated(row: Batch, copies: int, num: int = 0) -> Batch:
    """The row `copies` times; in copy e the ids of virtual tokens are lower by e · `num`."""
    import torch

    device = row.input_ids_T.device
    tokens, samples = row.cu_seqlens_S[-1], len(row.parent_S)
    cu_seqlens_S = [0]
    for e in range(copies):
        cu_seqlens_S += [e * tokens + end for end in row.cu_seqlens_S[1:]]
    copy_E1 = torch.arange(copies, device=device)[:, None]
    ids_ET = row.input_ids_T - (row.input_ids_T < 0) * num * copy_E1
    return replace(
        row,
        input_ids_T=ids_ET.flatten(),
        position_ids_T=row.position_ids_T.repeat(copies),
        cu_seqlens_S=cu_seqlens_S,
        bounds_S=torch.tensor(cu_seqlens_S, dtype=torch.int32).to(device, non_blocking=True),
        supervised_N=(row.supervised_N + tokens * copy_E1).flatten(),
        sample_id_S=row.sample_id_S * copies,
        parent_S=[p + e * samples if p >= 0 else -1 for e in range(copies) for p in row.parent_S],
    )


def prepend(model: Any, prompt_PD: torch.Tensor, num: int, batch: Batch) -> torch.Tensor:
    """Embeddings [T, D] of an extended row: the model's own, trained vectors in virtual places.

    Each vector is used once a sample; its gradient adds up in float32, whatever the model computes
    in: two hundred samples would be lost in the rounding of a bfloat16 sum.
    """
    import torch

    ids_T = batch.input_ids_T
    starts = [start for start, p in zip(batch.cu_seqlens_S, batch.parent_S, strict=False) if p < 0]
    start_R = torch.tensor(starts).to(ids_T.device, non_blocking=True)
    place_V = (start_R[:, None] + torch.arange(num, device=ids_T.device)).flatten()
    words_TD: torch.Tensor = model.get_input_embeddings()(ids_T.clamp(min=0))
    own_VD = prompt_PD.float().index_select(0, -1 - ids_T[place_V])
    return words_TD.index_copy(0, place_V, own_VD.to(words_TD.dtype))


# ---------------------------------------------------------------------------------- first values


@contextmanager
def whole(parameters: Iterable[Any]) -> Iterator[None]:
    """Bring parameters whole to this rank, where ZeRO-3 holds them in shards; collective.

    By the parameters' own methods, so that DeepSpeed is not imported.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_id") and not p.numel()]
    for parameter in sharded:
        parameter.all_gather()
    try:
        yield
    finally:
        for parameter in sharded:
            parameter.partition()


@contextmanager
def whole_while_called(model: nn.Module) -> Iterator[None]:
    """Let every module have its own parameters whole while it runs, as `whole` does."""
    import torch

    held: dict[int, Any] = {}

    def enter(module: nn.Module, args: Any) -> None:
        context = whole(module.parameters(recurse=False))
        context.__enter__()
        held[id(module)] = context

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        held.pop(id(module)).__exit__(None, None, None)

    handles = []
    for module in model.modules():
        if any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
            handles += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            ]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def text_ids(model: Any, text: str, num: int) -> list[int]:
    """The first `num` tokens of a text, which is repeated where it has fewer.

    Raises:
        ConfigError: it has none.
        ModelError: the model's folder has no tokenizer.
    """
    from pathlib import Path

    from posttrain_dist.models.folder import load_tokenizer

    tokenizer = load_tokenizer(Path(model.name_or_path)).backend_tokenizer
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise ConfigError(
            f"{text!r} has no token",
            where="tuning.init_text",
            fix="write a text, or set it to null",
        )
    return (ids * math.ceil(num / len(ids)))[:num]


def text_rule(text: str | None) -> Rule:
    """A text that something begins with is not empty."""
    return Rule(
        text is None or bool(text.strip()),
        "tuning.init_text",
        "is empty",
        "write what the virtual tokens are to begin with, or set it to null",
    )


def embed_words(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Embeddings [len(ids), D] as the model's own module gives them, scale and all."""
    import torch

    embedding = model.get_input_embeddings()
    with whole(embedding.parameters()), torch.no_grad():
        found: torch.Tensor = embedding(torch.tensor(ids, device=embedding.weight.device).long())
        return found.clone()


def embedding_width(model: Any) -> int:
    """D of the input embedding, which is not always the hidden size (OPT)."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[-1])


def new_embedding(model: Any, value_PD: torch.Tensor) -> nn.Module:
    """A table of trained vectors that is called, so that the hooks of ZeRO-3 fire."""
    from torch import nn

    weight = model.get_input_embeddings().weight
    table = nn.Embedding(value_PD.shape[0], value_PD.shape[1])
    table.weight = nn.Parameter(value_PD.to(weight.dtype))
    return table


def rows_of(table: Any) -> torch.Tensor:
    """Every vector of a `new_embedding`, by a call."""
    import torch

    found: torch.Tensor = table(torch.arange(table.num_embeddings, device=table.weight.device))
    return found


# ------------------------------------------------------------------------------------- the files


def saved_embeddings(
    saved: SavedAdapter, kinds: Sequence[str], shape: tuple[int, int]
) -> torch.Tensor:
    """The tensor of an adapter, of the sizes that are wanted.

    Raises:
        ModelError: the adapter is of another method, or of other sizes.
    """
    kind = saved.config.get("peft_type")
    if kind not in kinds:
        raise ModelError(
            f"holds an adapter of the type {kind}, not {' or '.join(kinds)}",
            where="tuning.init_from",
            fix="name an adapter of the same method, or set tuning to its method",
        )
    found = saved.tensors.get(EMBEDDINGS)
    if found is None or tuple(found.shape) != shape:
        sizes = "is not there" if found is None else f"is {list(found.shape)}"
        raise ModelError(
            f"{EMBEDDINGS} {sizes}, and this run has {list(shape)}",
            where="tuning.init_from",
            fix="set tuning.tokens (tuning.ensemble for several prompts) as it was when the "
            "adapter was trained, and use the model that it was trained on",
        )
    return found


def peft_config(kind: str, network: Mapping[str, Any], tokens: int, **more: Any) -> dict[str, Any]:
    """What `peft` wants to know of every virtual token."""
    from posttrain_dist.models.shape import ModelShape

    shape = ModelShape.of(network)
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": tokens,
        "num_transformer_submodules": 1,
        "num_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        **more,
    }
