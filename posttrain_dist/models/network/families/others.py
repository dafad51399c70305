"""What single architectures have beside linears and norms: in a layer, and around the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain_dist.models.network.families.layer_parts import LayerSizes
from posttrain_dist.models.network.tensors import Linear, Tensor, part_of
from posttrain_dist.models.shape import ModelShape

Values = dict[str, Any]
FINAL = "the final norm"


def _apertus(shape: ModelShape, values: Values, sizes: LayerSizes) -> list[Tensor]:
    """Slopes of its activation (xIELU, arXiv:2411.13010)."""
    if values.get("hidden_act") != "xielu":
        return []
    return [Tensor(f"mlp.act_fn.{name}", (1,)) for name in ("alpha_p", "alpha_n")]


def _bitnet(shape: ModelShape, values: Values, sizes: LayerSizes) -> list[Tensor]:
    return [
        Tensor("self_attn.attn_sub_norm.weight", (shape.hidden_size,)),
        Tensor("mlp.ffn_sub_norm.weight", (sizes.intermediate_size,)),
    ]


def _diffllama(shape: ModelShape, values: Values, sizes: LayerSizes) -> list[Tensor]:
    names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    return [Tensor(f"self_attn.{name}", (sizes.head_dim,)) for name in names]


def _gemma4(shape: ModelShape, values: Values, sizes: LayerSizes) -> list[Tensor]:
    if not values.get("hidden_size_per_layer_input"):
        return []
    return [Tensor("post_per_layer_input_norm.weight", (shape.hidden_size,))]


def _hyperclovax(shape: ModelShape, values: Values, sizes: LayerSizes) -> list[Tensor]:
    if not values.get("use_post_norm"):
        return []
    return [Tensor(f"{name}.weight", (shape.hidden_size,)) for name in ("post_norm1", "post_norm2")]


def _minicpm3(shape: ModelShape, values: Values, sizes: LayerSizes) -> list[Tensor]:
    ranks = {"q_a_layernorm": values.get("q_lora_rank"), "kv_a_layernorm": values["kv_lora_rank"]}
    return [Tensor(f"self_attn.{name}.weight", (rank,)) for name, rank in ranks.items() if rank]


def _stablelm(shape: ModelShape, values: Values, sizes: LayerSizes) -> list[Tensor]:
    """One norm for each head."""
    if not values.get("qk_layernorm"):
        return []
    heads = {"q_layernorm": shape.num_heads, "k_layernorm": sizes.num_kv_heads}
    return [
        Tensor(f"self_attn.{name}.norms.{head}.weight", (sizes.head_dim,))
        for name, count in heads.items()
        for head in range(count)
    ]


IN_A_LAYER: dict[str, Callable[[ModelShape, Values, LayerSizes], list[Tensor]]] = {
    "apertus": _apertus,
    "bitnet": _bitnet,
    "diffllama": _diffllama,
    "gemma4_text": _gemma4,
    "hyperclovax": _hyperclovax,
    "minicpm3": _minicpm3,
    "stablelm": _stablelm,
    "youtu": _minicpm3,
}


def linears_of_layer(shape: ModelShape, values: Values) -> list[Linear]:
    """Linears of a layer that are neither attention nor MLP: Gemma 4's inputs of each layer."""
    width, hidden = values.get("hidden_size_per_layer_input"), shape.hidden_size
    if shape.model_type != "gemma4_text" or not width:
        return []
    sizes = {"per_layer_input_gate": (hidden, width), "per_layer_projection": (width, hidden)}
    return [Linear(name, *size, part_of(name)) for name, size in sizes.items()]


def linears_around(shape: ModelShape, values: Values) -> list[Linear]:
    """Linears of the backbone that are in no layer, by their names in it."""
    hidden = shape.hidden_size
    if shape.model_type == "opt" and embedding_width(shape, values) != hidden:
        width = embedding_width(shape, values)
        sizes = {"project_out": (hidden, width), "project_in": (width, hidden)}
        return [Linear(name, *size, "outside") for name, size in sizes.items()]
    if shape.model_type == "gemma4_text" and values.get("hidden_size_per_layer_input"):
        all_layers = shape.num_layers * values["hidden_size_per_layer_input"]
        return [Linear("per_layer_model_projection", hidden, all_layers, "outside")]
    return []


def tensors_around(shape: ModelShape, values: Values) -> list[Tensor]:
    """Parameters beside embeddings, positions, linears and the final norm, by their names there."""
    width = values.get("hidden_size_per_layer_input")
    if shape.model_type != "gemma4_text" or not width:
        return []
    vocabulary = values["vocab_size_per_layer_input"]
    return [
        Tensor("embed_tokens_per_layer.weight", (vocabulary, shape.num_layers * width)),
        Tensor("per_layer_projection_norm.weight", (width,)),
    ]


def has_norms(shape: ModelShape, values: Values, name: str) -> bool:
    """Whether the norms of a name are there, with parameters; of the layers if not `final`."""
    if shape.model_type == "opt":
        there = values["do_layer_norm_before"] and not values.get("_remove_final_layer_norm")
        return bool(values["layer_norm_elementwise_affine"] and (name != FINAL or there))
    # StableLM's second norm is not there where attention and MLP run side by side.
    parallel = shape.model_type == "stablelm" and values.get("use_parallel_residual")
    return not (parallel and name == "post_attention_layernorm")


def embedding_width(shape: ModelShape, values: Values) -> int:
    """Width of embedding and head: OPT's may be narrower than its layers."""
    width = values.get("word_embed_proj_dim") if shape.model_type == "opt" else None
    return width or shape.hidden_size
