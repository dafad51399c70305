"""The model of qlora_70b.py, a Llama of random weights in NF4, with LoRA; its memory, foretold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
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


def planned_job(
    shape: Shape, tokens: int, *, gpu: bool, offload: bool = False, state_bits: int = 32
) -> Any:
    """Such a run as the planner takes it, on one H100 or on the CPU that is here.

    Args:
        offload: the inputs of layers wait in host memory.
        state_bits: of each of the two moments of a trained parameter; those of 8 are paged.
    """
    from posttrain_dist.config import (
        AdamW,
        Dtype,
        Hardware,
        Lora,
        Quantize,
        RunConfig,
        Single,
        complete,
    )
    from posttrain_dist.models import Checkpointing
    from posttrain_dist.planner.job import fullest_row
    from posttrain_dist.planner.machine import find_machine
    from posttrain_dist.planner.make_job import make_job

    h100 = Hardware(gpu="h100", gpus_per_node=1, host_memory_gib=1000.0, cpus_per_node=64)
    config = RunConfig(
        name="qlora",
        tuning=Lora(rank=RANK, quantize=Quantize.nf4),
        optimizer=AdamW(state_bits=state_bits, paged=state_bits == 8),
        engine=Single(),
        hardware=h100 if gpu else Hardware(),
    )
    config.model.activation_checkpointing = Checkpointing.full
    config.model.checkpoint_offload = offload
    config.data.max_length, config.train.batch_size = tokens, 1
    config.train.dtype = Dtype.bfloat16 if gpu else Dtype.float32
    with TemporaryDirectory() as folder:
        values = llama_config(shape).to_dict() | {"architectures": ["LlamaForCausalLM"]}
        Path(folder, "config.json").write_text(json.dumps(values, default=str), encoding="utf-8")
        config.model.path = folder
        config = complete(config)
        job = make_job(config, find_machine(config, plans_only=gpu))
    return job.with_row(fullest_row(tokens, min(shape.sample, tokens)))


def foretold_bytes(job: Any) -> int:
    """The planner's peak of an update: nothing is checked, evaluated or saved here."""
    from posttrain_dist.planner.memory.phases import device_phases
    from posttrain_dist.planner.plan import PhaseName

    update = (PhaseName.forward, PhaseName.backward, PhaseName.update)
    return max(p.allocated_bytes for p in device_phases(job) if p.name in update)
