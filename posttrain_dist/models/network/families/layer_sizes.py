"""How the layers of one model differ: Gemma 4's by what they attend to, and by what they share."""

from __future__ import annotations

from typing import Any

from posttrain_dist.models.network.families.layer_parts import LayerSizes
from posttrain_dist.models.shape import ModelShape, own_layers


def layer_sizes(shape: ModelShape, values: dict[str, Any]) -> list[LayerSizes]:
    """Of each layer, first to last."""
    plain = LayerSizes(shape.head_dim, shape.num_kv_heads, shape.intermediate_size)
    if shape.model_type not in ("gemma4_text", "gemma4_unified_text"):
        return [plain] * shape.num_layers
    first_shared = shape.num_layers - (values.get("num_kv_shared_layers") or 0)
    wide = shape.intermediate_size * (2 if values.get("use_double_wide_mlp") else 1)
    own = own_layers(values)
    found = []
    for i in range(shape.num_layers):
        sizes, shared = own.get(i, {}), i >= first_shared
        found.append(
            LayerSizes(
                head_dim=sizes.get("head_dim") or shape.head_dim,
                num_kv_heads=sizes.get("num_key_value_heads") or shape.num_kv_heads,
                intermediate_size=wide if shared else shape.intermediate_size,
                has_keys=not shared,
                has_values=not (i in own and values.get("attention_k_eq_v")),
            )
        )
    return found
