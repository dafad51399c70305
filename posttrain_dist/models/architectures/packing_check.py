"""A packed row beside each of its samples alone, under transformers' own attention.

For architectures that no test of this project vouches for: one that ignores positions, carries a
state over the row or masks in a way of its own computes something else in a pack.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from posttrain_dist.errors import ModelError
from posttrain_dist.models.varlen import RowPrefix

# Largest difference of a logit, relative to the largest one: two ways to compute attention.
TOLERANCE = {torch.float32: 1e-3}
HALF = 1e-1  # in half precision, where rounding alone makes up to 0.025 in two layers


def check_packing(model: Any, inputs: Mapping[str, Any], logits_TV: torch.Tensor) -> None:
    """Compare the logits of a packed row with those of its samples alone.

    Args:
        model: a transformers causal LM.
        inputs: keywords that gave `logits_TV`: ids or embeddings, `position_ids`, `cu_seqlens`,
            `parent_S`, behind which samples stand; a `prefix` is what a sample alone has in its
            key and value cache.
        logits_TV: of the packed row.

    Raises:
        ModelError: a sample has other logits in the row than alone.
    """
    rows = {name: inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs}
    rows["position_ids"] = inputs["position_ids"]
    packed_attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    alone: list[torch.Tensor] = []
    paths: list[list[int]] = []
    try:
        bounds = pairwise(inputs["cu_seqlens"])
        for (start, end), parent in zip(bounds, inputs["parent_S"], strict=True):
            paths.append([*(paths[parent] if parent >= 0 else []), *range(start, end)])
            path = torch.tensor(paths[-1], device=logits_TV.device)
            sample = {name: row.index_select(1, path) for name, row in rows.items()}
            logits_PV = model(**sample, **_cache(inputs.get("prefix"))).logits[0]
            alone.append(logits_PV[start - end :])
    finally:
        model.set_attn_implementation(packed_attention)
    alone_TV = torch.cat(alone).float()
    difference = float((logits_TV.float() - alone_TV).abs().max())
    largest = max(1.0, float(alone_TV.abs().max()))
    if not difference <= TOLERANCE.get(logits_TV.dtype, HALF) * largest:
        raise ModelError(
            f"{type(model).__name__} computes other logits for a sample in a packed row than for "
            f"the sample alone: they differ by {difference:.2e}, the largest is {largest:.2e}",
            where="model.path",
            fix="nothing was trained; use an architecture that docs/models.md lists as trained",
        )


def _cache(prefix: RowPrefix | None) -> dict[str, Any]:
    """Keywords of a sample alone: with the prefix in its cache, as `peft` does it."""
    if prefix is None or not prefix.kv_L[0].shape[2]:
        return {"use_cache": False}
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, kv in enumerate(prefix.kv_L):
        cache.update(*kv[:, None], layer)
    return {"use_cache": True, "past_key_values": cache}
