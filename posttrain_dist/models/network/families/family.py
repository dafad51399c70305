"""What one architecture calls its parts, and which of them it has."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# A bias that is there, is not, or depends on a key of config.json.
Bias = bool | str


class Heads(StrEnum):
    """What the norms of queries and keys scale."""

    none = "none"
    shared = "shared"  # [head_dim], one for all heads
    each = "each"  # [heads, head_dim]
    whole = "whole"  # [heads * head_dim]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The defaults are Llama's.

    Attributes:
        model: module of the backbone; everything but the head is in it.
        positions: name of learned positions, and how many more there are than config.json says.
        queries: the projections to queries, keys and values; a single one makes all three.
        latent: queries, keys and values come out of low ranks (multi-head latent attention,
            DeepSeek-V2, arXiv:2405.04434).
        mlp: its module; empty: its linears stand in the layer itself.
        mlp_in: its first linears; a single `gate_up_proj` makes both halves of a gated one.
        norms: of a layer, over its hidden states.
        norm_parts: parameters of these and of the final norm.
        head_norms: names of the norms of queries and keys.
        head_norms_if: key of config.json that switches them on; empty: they are always there.
    """

    model: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    positions: tuple[str, int] | None = None
    final_norm: str = "norm"
    head: str = "lm_head"
    head_bias: bool = False

    attention: str = "self_attn"
    queries: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    query_bias: Bias = "attention_bias"
    output_bias: Bias = "attention_bias"
    latent: bool = False

    mlp: str = "mlp"
    mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_out: str = "down_proj"
    mlp_bias: Bias = False
    transposed: bool = False

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_parts: tuple[str, ...] = ("weight",)
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    head_norms_over: Heads = Heads.none
    head_norms_if: str = ""
