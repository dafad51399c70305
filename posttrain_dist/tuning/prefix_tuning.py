"""Prefix tuning (Li and Liang, arXiv:2101.00190): trained keys and values before every sample.

Legend beside that of flow.py: L layers, H heads of keys and values, k pairs, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain_dist.errors import ModelError, Rule
from posttrain_dist.tuning.base import SavedAdapter
from posttrain_dist.tuning.virtual import (
    EMBEDDINGS,
    VirtualTuning,
    new_embedding,
    peft_config,
    rows_of,
    saved_embeddings,
    text_ids,
    text_rule,
    whole,
    whole_while_called,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from posttrain_dist.flow import Batch

# Attention that does not take keys and values as they stand in the cache, where `peft` puts them.
_OTHER_VALUES = {"diffllama": "joins its values in pairs behind the cache"}


@dataclass(kw_only=True, slots=True)
class Prefix(VirtualTuning):
    """`tokens` key and value pairs in every layer, which each sample attends to first."""

    # Text whose keys and values the prefix begins with, so that the model starts as if the text
    # stood before every sample; null: zeros, to which a part of the attention goes.
    init_text: str | None = None

    default_lr: ClassVar[float] = 0.1
    marks: ClassVar[tuple[str, ...]] = ("prefix",)

    def rules(self) -> list[Rule]:
        """Ranges."""
        return [*VirtualTuning.rules(self), text_rule(self.init_text)]

    @property
    def inserted_tokens(self) -> int:
        """None: a prefix has no place in the row."""
        return 0

    def check_network(self, network: Mapping[str, Any]) -> None:
        """Refuse layers whose keys and values are not all of one size, that of the cache."""
        from posttrain_dist.models.shape import ModelShape

        shape = ModelShape.of(network)
        what = _OTHER_VALUES.get(shape.model_type, "")
        if {shape.widest_head, shape.value_head_dim} != {shape.head_dim}:
            what = "has keys and values of several widths"
        if what:
            raise ModelError(
                f"a {shape.model_type} model {what}, so that a prefix does not fit its attention",
                where="tuning",
                fix="use tuning=prompt or tuning=lora",
            )

    def insert(self, model: nn.Module) -> None:
        """A table `prefix` [k, L · 2 · H · d], in the order of `peft`."""
        import torch

        network: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
        self.check_network(network)
        layers, heads, width = shape = _kv_shape(network)
        value = torch.zeros(self.tokens, layers * 2 * heads * width)
        if self.init_text is not None and self.tokens:
            kv_L = _text_cache(model, text_ids(model, self.init_text, self.tokens))
            value = torch.stack(kv_L).permute(3, 0, 1, 2, 4).reshape(value.shape)
        table: Any = new_embedding(model, value)
        table.kv_shape = shape
        model.prefix = table

    def extend(self, batch: Batch) -> Batch:
        """The same row, with positions that count the prefix."""
        return replace(batch, position_ids_T=batch.position_ids_T + self.tokens)

    def row_keywords(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """The keys and values of every layer."""
        from posttrain_dist.models.varlen import RowPrefix

        table: Any = model.prefix
        layers, heads, width = table.kv_shape
        kv = rows_of(table).float().view(self.tokens, layers, 2, heads, width)
        return {"prefix": RowPrefix.of(kv.permute(1, 2, 3, 0, 4).unbind(), batch)}

    def to_adapter(
        self, kept: Mapping[str, torch.Tensor], network: Mapping[str, Any]
    ) -> SavedAdapter:
        """As `peft` saves a prefix without projection."""
        _, heads, width = _kv_shape(network)
        config = peft_config(
            "PREFIX_TUNING",
            network,
            self.tokens,
            num_attention_heads=heads,
            token_dim=heads * width,
            encoder_hidden_size=heads * width,
            prefix_projection=False,
        )
        return SavedAdapter(config, {EMBEDDINGS: kept["prefix.weight"]})

    def from_adapter(
        self, saved: SavedAdapter, network: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The prefix of a folder of `peft`."""
        layers, heads, width = _kv_shape(network)
        shape = (self.tokens, layers * 2 * heads * width)
        return {"prefix.weight": saved_embeddings(saved, ("PREFIX_TUNING",), shape)}


def _kv_shape(network: Mapping[str, Any]) -> tuple[int, int, int]:
    """(layers, heads of keys and values, their width)."""
    from posttrain_dist.models.shape import ModelShape

    shape = ModelShape.of(network)
    return shape.num_layers, shape.num_kv_heads, shape.head_dim


def _text_cache(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """Keys and values [2, H, k, d] that a text has in each layer, at positions from 0 on."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()  # of no config: one with a window would forget what is outside of it
    embedding = model.get_input_embeddings()
    with whole(embedding.parameters()):
        device = embedding.weight.device
    with whole_while_called(model):
        model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.arange(len(ids), device=device)[None],
            cu_seqlens=[0, len(ids)],
            bounds_S=torch.tensor([0, len(ids)], dtype=torch.int32, device=device),
            max_seqlen=len(ids),
            past_key_values=cache,
            use_cache=True,
        )
    return [torch.cat([layer.keys, layer.values]) for layer in cache.layers]
