"""The linears and other parameters of one decoder layer."""

from __future__ import annotations

from typing import Any, NamedTuple

from posttrain_dist.models.network.families.family import Bias, Family, Heads
from posttrain_dist.models.network.tensors import Linear, Tensor, part_of
from posttrain_dist.models.shape import ModelShape


class LayerSizes(NamedTuple):
    """What may differ from layer to layer, in elements."""

    head_dim: int
    num_kv_heads: int
    intermediate_size: int
    has_keys: bool = True  # false: those of a layer below are used, values too
    has_values: bool = True  # false: the keys are the values


def has(bias: Bias, values: dict[str, Any]) -> bool:
    """Whether a bias, or another part, is there."""
    return bool(values.get(bias)) if isinstance(bias, str) else bias


def attention(
    family: Family, shape: ModelShape, values: dict[str, Any], sizes: LayerSizes
) -> list[Linear]:
    """The projections of self-attention."""
    hidden, heads = shape.hidden_size, shape.num_heads
    queries, keys = heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    bias = has(family.query_bias, values)
    if len(family.queries) == 1:
        widths = {family.queries[0]: queries + 2 * keys}
    else:
        widths = dict(zip(("q_proj", "k_proj", "v_proj"), (queries, keys, keys), strict=True))
    there = {"k_proj": sizes.has_keys, "v_proj": sizes.has_keys and sizes.has_values}
    found = [
        _linear(family, f"{family.attention}.{name}", hidden, widths[name], bias)
        for name in family.queries
        if there.get(name, True)
    ]
    output = f"{family.attention}.{family.output}"
    return [*found, _linear(family, output, queries, hidden, has(family.output_bias, values))]


def latent_attention(family: Family, shape: ModelShape, values: dict[str, Any]) -> list[Linear]:
    """The same through low ranks: DeepSeek-V2, arXiv:2405.04434, section 2.1."""
    hidden, heads = shape.hidden_size, shape.num_heads
    bias = has(family.query_bias, values)
    rotated, plain = values["qk_rope_head_dim"], values["qk_nope_head_dim"]
    query_rank, key_rank = values.get("q_lora_rank"), values["kv_lora_rank"]
    queries, width = heads * (plain + rotated), shape.value_head_dim
    sizes: dict[str, tuple[int, int, bool]] = {}
    if query_rank is None:
        sizes["q_proj"] = (hidden, queries, False)
    else:
        sizes["q_a_proj"] = (hidden, query_rank, bias)
        sizes["q_b_proj"] = (query_rank, queries, False)
    sizes["kv_a_proj_with_mqa"] = (hidden, key_rank + rotated, bias)
    sizes["kv_b_proj"] = (key_rank, heads * (plain + width), False)
    sizes["o_proj"] = (heads * width, hidden, bias)
    return [_linear(family, f"{family.attention}.{name}", *size) for name, size in sizes.items()]


def mlp(family: Family, shape: ModelShape, values: dict[str, Any], width: int) -> list[Linear]:
    """The linears of the MLP."""
    prefix = f"{family.mlp}." if family.mlp else ""
    bias, hidden = has(family.mlp_bias, values), shape.hidden_size
    both = 2 if family.mlp_in == ("gate_up_proj",) else 1
    found = [
        _linear(family, f"{prefix}{name}", hidden, both * width, bias) for name in family.mlp_in
    ]
    return [*found, _linear(family, f"{prefix}{family.mlp_out}", width, hidden, bias)]


def norms(
    family: Family, shape: ModelShape, values: dict[str, Any], sizes: LayerSizes
) -> list[Tensor]:
    """The norms over hidden states, and those over queries and keys."""
    found = [
        Tensor(f"{name}.{part}", (shape.hidden_size,))
        for name in family.norms
        for part in family.norm_parts
    ]
    over = family.head_norms_over
    if over is Heads.none or (family.head_norms_if and not values.get(family.head_norms_if)):
        return found
    counts = (shape.num_heads, sizes.num_kv_heads)
    parts = family.norm_parts
    for name, heads in list(zip(family.head_norms, counts, strict=True))[: 1 + sizes.has_keys]:
        each = {
            Heads.shared: (sizes.head_dim,),
            Heads.each: (heads, sizes.head_dim),
            Heads.whole: (heads * sizes.head_dim,),
        }
        found += [Tensor(f"{family.attention}.{name}.{part}", each[over]) for part in parts]
    return found


def _linear(family: Family, name: str, inside: int, outside: int, bias: bool) -> Linear:
    return Linear(name, inside, outside, part_of(name), bias, family.transposed)
