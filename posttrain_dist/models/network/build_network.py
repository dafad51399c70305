"""config.json -> Network. No weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from posttrain_dist.errors import ModelError
from posttrain_dist.models.architectures.defaults import completed
from posttrain_dist.models.network.families.family import Family
from posttrain_dist.models.network.families.layer_parts import (
    LayerSizes,
    attention,
    latent_attention,
    mlp,
    norms,
)
from posttrain_dist.models.network.families.layer_sizes import layer_sizes
from posttrain_dist.models.network.families.others import (
    FINAL,
    IN_A_LAYER,
    embedding_width,
    has_norms,
    linears_around,
    linears_of_layer,
    tensors_around,
)
from posttrain_dist.models.network.families.table import FAMILIES
from posttrain_dist.models.network.tensors import Layer, Linear, Network, Tensor
from posttrain_dist.models.shape import ModelShape, read_size

# Whose output projection, or norm before it, is hidden_size wide.
_WHOLE_HEADS = {"bitnet", "helium"}


def build_network(config: Mapping[str, Any], where: str = "config.json") -> Network:
    """Every parameter of the model that a config.json describes, as transformers builds it.

    Args:
        config: of a type that docs/models.md lists as trained; `models/folder.py` refuses others.
        where: the file, for errors.

    Raises:
        ModelError: the type is not known, or a size is missing, none, or contradicts another.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ModelError(
            f"is of the type {config.get('model_type')}, whose tensors are not known: its memory "
            "cannot be planned",
            where=where,
            fix="plan with a type that docs/models.md lists as trained; training tries others, "
            "with tuning and engine named",
        )
    shape, values = ModelShape.of(config, where), completed(config)
    _check_sizes(shape, where)
    kinds = layer_sizes(shape, values)
    layers = {sizes: _layer(family, shape, values, sizes) for sizes in set(kinds)}
    before, after, head, outside = _around(family, shape, values, where)
    return Network(
        shape=shape,
        config=config,
        layers=tuple(layers[sizes] for sizes in kinds),
        layers_name=f"{family.model}.{family.layers}",
        before=before,
        after=after,
        head=head,
        outside=outside,
        buffer_bytes=_buffer_bytes(shape, values),
    )


def _layer(family: Family, shape: ModelShape, values: dict[str, Any], sizes: LayerSizes) -> Layer:
    linears = (
        latent_attention(family, shape, values)
        if family.latent
        else attention(family, shape, values, sizes)
    )
    linears += mlp(family, shape, values, sizes.intermediate_size)
    linears += linears_of_layer(shape, values)
    names = [name for name in family.norms if has_norms(shape, values, name)]
    others = norms(replace(family, norms=tuple(names)), shape, values, sizes)
    if shape.model_type in IN_A_LAYER:
        others += IN_A_LAYER[shape.model_type](shape, values, sizes)
    return Layer(tuple(linears), tuple(others))


def _around(
    family: Family, shape: ModelShape, values: dict[str, Any], where: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], tuple[Linear, ...]]:
    """What is before the layers, after them, the head's own, and all linears of these."""
    width, hidden = embedding_width(shape, values), shape.hidden_size
    before = [Tensor(f"{family.embedding}.weight", (shape.vocab_size, width))]
    if family.positions:
        name, more = family.positions
        count = read_size(values, "max_position_embeddings", where)
        before.append(Tensor(f"{name}.weight", (count + more, hidden)))
    linears = [
        Linear(f"{family.model}.{linear.name}", linear.in_features, linear.out_features, "outside")
        for linear in linears_around(shape, values)
    ]
    before += tensors_around(shape, values)
    parts = family.norm_parts if has_norms(shape, values, FINAL) else ()
    after = [Tensor(f"{family.final_norm}.{part}", (hidden,)) for part in parts]
    head = Linear(family.head, width, shape.vocab_size, "outside", family.head_bias)
    own = head.tensors[1:] if shape.tied else head.tensors
    before, after = ([_inside(family, t) for t in part] for part in (before, after))
    before += [tensor for linear in linears for tensor in linear.tensors]
    return tuple(before), tuple(after), own, (*linears, head)


def _buffer_bytes(shape: ModelShape, values: dict[str, Any]) -> int:
    """GPT-BigCode keeps its causal mask, a byte for each pair of positions."""
    positions: int = values["max_position_embeddings"] if shape.model_type == "gpt_bigcode" else 0
    return positions * positions


def _inside(family: Family, tensor: Tensor) -> Tensor:
    return Tensor(f"{family.model}.{tensor.name}", tensor.shape)


def _check_sizes(shape: ModelShape, where: str) -> None:
    """What `ModelShape` does not compare."""
    if shape.model_type in _WHOLE_HEADS and shape.num_heads * shape.head_dim != shape.hidden_size:
        raise ModelError(
            f"hidden_size is {shape.hidden_size}, and {shape.num_heads} heads of {shape.head_dim} "
            f"are not as wide together, which {shape.model_type} needs",
            where=where,
            fix="use a folder written by transformers' save_pretrained",
        )
