"""The last decoder layer: what leaves it are the supervised rows only.

Behind it stand the final norm and the head, which then meet N rows instead of T. Inside it, in the
architectures of `_FAMILIES`, only keys and values are made of all rows: a query, an attention
output or an MLP of a row whose hidden state nobody reads is not computed. Exact, gradients too.

The rows travel as the keyword `supervised_N` through the backbone; without it a model is as it was.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from posttrain_dist.models.layers import decoder_layers

_log = logging.getLogger(__name__)


def select_supervised_rows(backbone: nn.Module) -> None:
    """Make `backbone(..., supervised_N=rows)` return the last hidden states of these rows only.

    A layer of a class that is not known here runs on all rows, and the log says so.

    Raises:
        ModelError: the backbone has no decoder layer.
    """
    last = decoder_layers(backbone)[-1]
    base = type(last)
    family = _FAMILIES.get(base.__name__)
    if family is None or not base.__module__.startswith("transformers.models."):
        _log.warning("%s runs on all rows: its last layer is not known here", base.__name__)
        last.register_forward_hook(_select, with_kwargs=True)
        return
    # A subclass, not a function put on the object: activation checkpointing wraps the forward of
    # the class (transformers 5.23) or its call (5.17), and hooks fire as before.
    last.__class__ = type(f"Short{base.__name__}", (base,), {"forward": _forward(base, family)})


def _select(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """The rows `supervised_N` of the layer's output [1, T, D]; padding may repeat a row."""
    rows_N: torch.Tensor | None = kwargs.get("supervised_N")
    if rows_N is None:
        return output
    if isinstance(output, tuple):
        return (output[0].index_select(1, rows_N), *output[1:])
    return output.index_select(1, rows_N)


# ------------------------------------------------------------------------------- known layers


@dataclass(frozen=True, slots=True)
class _Family:
    """What differs between decoder layers that are built like Llama's.

    Attributes:
        finish: (layer, hidden, attended) -> output; all of it row by row.
        options: attention module -> what it hands to the attention function beside the rest.
    """

    finish: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    options: Callable[[Any], dict[str, Any]]


def _forward(base: Any, family: _Family) -> Callable[..., Any]:
    def forward(
        self: Any, hidden_states: torch.Tensor, supervised_N: torch.Tensor | None = None, **kw: Any
    ) -> Any:
        if supervised_N is None:
            return base.forward(self, hidden_states, **kw)
        normed = self.input_layernorm(hidden_states)
        options = family.options(self.self_attn)
        attended = _attend(self.self_attn, normed, supervised_N, **options, **kw)
        return family.finish(self, hidden_states.index_select(1, supervised_N), attended)

    return forward


def _attend(
    attention: Any,
    normed: torch.Tensor,
    rows_N: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **options: Any,
) -> torch.Tensor:
    """Self-attention of the rows `rows_N` of [1, T, D] over all rows; [1, N, D]."""
    heads = (-1, attention.head_dim)
    query = attention.q_proj(normed.index_select(1, rows_N)).unflatten(-1, heads)
    key = attention.k_proj(normed).unflatten(-1, heads)
    value = attention.v_proj(normed).unflatten(-1, heads)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    # The attention takes a query a row. One that nobody asked for gets another's: its output is
    # dropped, so that its gradient is zero.
    query = query.index_select(1, _places(rows_N, normed.shape[1]))
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
    output, _ = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation](
        attention,
        query,
        key,
        value.transpose(1, 2),
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **options,
    )
    attended: torch.Tensor = attention.o_proj(output.flatten(2).index_select(1, rows_N))
    return attended


def _places(rows_N: torch.Tensor, num_rows: int) -> torch.Tensor:
    """place_T: where row t first stands in `rows_N`; the last place where it does not stand."""
    places_N = torch.arange(len(rows_N), device=rows_N.device)
    place_T = places_N[-1].expand(num_rows).clone()
    return place_T.scatter_reduce_(0, rows_N, places_N, "amin")


def _pre_norm(layer: Any, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    hidden = hidden + attended
    output: torch.Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return output


def _scaled(layer: Any, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    hidden = hidden + attended * layer.residual_multiplier
    more = layer.mlp(layer.post_attention_layernorm(hidden))
    output: torch.Tensor = hidden + more * layer.residual_multiplier
    return output


def _sandwich(layer: Any, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    hidden = hidden + layer.post_attention_layernorm(attended)
    more = layer.mlp(layer.pre_feedforward_layernorm(hidden))
    output: torch.Tensor = hidden + layer.post_feedforward_layernorm(more)
    return output


def _windowed(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window}


# By the exact name of the class: one that does more has another name.
_FAMILIES = {
    "LlamaDecoderLayer": _Family(_pre_norm, lambda _: {}),
    "MistralDecoderLayer": _Family(
        _pre_norm, lambda attention: {"sliding_window": attention.config.sliding_window}
    ),
    "Qwen2DecoderLayer": _Family(_pre_norm, _windowed),
    "Qwen3DecoderLayer": _Family(_pre_norm, _windowed),
    "GraniteDecoderLayer": _Family(_scaled, lambda _: {}),
    "Gemma2DecoderLayer": _Family(
        _sandwich,
        lambda attention: {**_windowed(attention), "softcap": attention.attn_logit_softcapping},
    ),
    "Gemma3DecoderLayer": _Family(_sandwich, _windowed),
}
