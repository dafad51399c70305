"""The model of qlora_70b.py, a Llama of random weights in NF4, with LoRA; its memory, foretold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

RANK = 16  # of LoRA


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama, and the rows that it is trained on."""

    hidden: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    contexts: tuple[int, ...]  # tokens of a packed row
    sample: int  # tokens of each sample of it
    step: int  # tokens by which the longest row that fits is searched


SHAPES = {
    "70b": Shape(8192, 80, 28672, 64, 8, 128_256, (4096, 8192, 16_384), 2048, 1024),
    "8b": Shape(4096, 32, 14_336, 32, 8, 128_256, (4096, 8192, 16_384), 2048, 1024),
    "small": Shape(64, 2, 128, 4, 2, 512, (64, 128, 192), 32, 32),
}


# ------------------------------------------------------------------------------ the model


def make_model(shape: Shape, dtype: torch.dtype, device: torch.device, *, offload: bool) -> Any:
    """A Llama of random weights, its layers in NF4, with LoRA, as `load_model` leaves one."""
    import transformers

    from posttrain_dist.models import Attention, Checkpointing, ModelConfig
    from posttrain_dist.models.attention import implementation, register
    from posttrain_dist.models.layers import checkpoint_activations
    from posttrain_dist.models.quantized.load_nf4 import prepare_linears
    from posttrain_dist.models.shape import ModelShape
    from posttrain_dist.models.varlen import AttentionRequirements
    from posttrain_dist.tuning.lora import Lora

    config = llama_config(shape)
    sizes = ModelShape.of(config.to_dict())
    register()
    attention = implementation(Attention.auto, AttentionRequirements.of(sizes, dtype))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    fill(model, dtype, device)
    prepare_linears(model, dtype, Path("a random model"))
    torch.manual_seed(0)
    Lora(rank=RANK).attach(model)
    model.config.use_cache = False
    checkpointing = ModelConfig(
        activation_checkpointing=Checkpointing.full, checkpoint_offload=offload
    )
    checkpoint_activations(model, checkpointing)
    return model


def llama_config(shape: Shape) -> Any:
    """The config of a Llama of these sizes."""
    import transformers

    return transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=131_072,
    )


@torch.no_grad()
def fill(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model on `meta` random weights on `device`: those of its layers' linears in NF4."""
    import bitsandbytes

    draw = torch.Generator(device).manual_seed(0)

    def random(parameter: torch.Tensor) -> torch.Tensor:
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        return values.normal_(0, 0.02, generator=draw)

    for name, module in list(model.model.layers.named_modules()):
        if type(module) is nn.Linear:
            with torch.device("meta"):
                linear = bitsandbytes.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=False,
                    compute_dtype=dtype,
                    quant_type="nf4",
                    quant_storage=dtype,
                )
            linear.weight = bitsandbytes.nn.Params4bit(
                random(module.weight),
                requires_grad=False,
                quant_type="nf4",
                quant_storage=dtype,
                module=linear,
            ).to(device)  # here it is quantised
            model.model.layers.set_submodule(name, linear)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            values = torch.ones_like(parameter, device=device) if "norm" in name else None
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.weight = nn.Parameter(random(parameter) if values is None else values)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


# --------------------------------------------------------------------------- what is foretold


def foretold_bytes(
    shape: Shape, tokens: int, dtype: torch.dtype, *, offload: bool, state_bits: int
) -> int:
    """Peak of a step on a row of so many tokens; see the top of qlora_70b.py.

    Args:
        offload: the inputs of layers wait in host memory.
        state_bits: of each of the two moments of a trained parameter.
    """
    from posttrain_dist.models.network.build_network import build_network
    from posttrain_dist.models.quantized import nf4_bytes

    size = dtype.itemsize
    base = nf4_bytes(build_network(llama_config(shape).to_dict()), size)
    moments = 2 * state_bits // 8
    # Parameters in float32 are their own master.
    trained = lora_parameters(shape) * (2 * size + (4 if size < 4 else 0) + moments)
    inputs = 0 if offload else shape.layers * tokens * shape.hidden * size
    # In backward: the gradients inside the MLP, of its product twice, for LoRA adds its own.
    gradients = tokens * size * (3 * shape.feed_forward + 2 * shape.hidden)
    layer = tokens * kept_by_layer(shape, size) + gradients
    dequantised = 2 * shape.hidden * shape.feed_forward * size
    return base + trained + inputs + layer + dequantised


def kept_by_layer(shape: Shape, size: int) -> int:
    """Bytes that a layer with LoRA keeps for its own backward, a token.

    The input of each norm in float32; what they return, queries, attention and its input; keys and
    values, rotated and not; gate, activation, up and product; and what each A returns.
    """
    keys = shape.hidden * shape.kv_heads // shape.heads
    values = 5 * shape.hidden + 4 * keys + 4 * shape.feed_forward + 7 * RANK
    return 2 * 4 * shape.hidden + size * values


def lora_parameters(shape: Shape) -> int:
    """Of rank RANK on the seven linears of each layer."""
    hidden, wide = shape.hidden, shape.feed_forward
    keys = hidden * shape.kv_heads // shape.heads
    sides = 2 * 2 * hidden + 2 * (hidden + keys) + 3 * (hidden + wide)
    return shape.layers * RANK * sides
