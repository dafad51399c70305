"""Whole training steps on one GPU for gpu.py: a 3B model in full, an 8B one with LoRA.

Weights are random, made on the GPU from a config; nothing is read or downloaded. What runs is the
project's own Policy, objective, collator and single-process engine. Model FLOP utilisation:

    MFU = model FLOP of the step / (seconds · peak)
    model FLOP = k · P · T  +  6 · P_lora · T  +  k · D · V · N_s  +  6 · L · A · sum(len^2)

with k = 6, or 4 where the weights are frozen (no gradient of theirs); P parameters of the layers,
without embedding and head; T tokens; N_s supervised ones; A = heads · head size; the last term is
causal attention (2 · L · A · len^2 forward, twice that backward). What is computed again in
backward does not count. Peak is the GPU's dense bf16 rate by its data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import rows
import torch

PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # SXM, dense bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama and how much of it is trained."""

    name: str
    hidden: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    lora_rank: int = 0  # 0: every weight is trained


LLAMA_3B = Shape(
    name="3B full",
    hidden=3072,
    layers=28,
    feed_forward=8192,
    heads=24,
    kv_heads=8,
    vocabulary=128_256,
    tied=True,
)
LLAMA_8B = Shape(
    name="8B LoRA",
    hidden=4096,
    layers=32,
    feed_forward=14_336,
    heads=32,
    kv_heads=8,
    vocabulary=128_256,
    tied=False,
    lora_rank=16,
)


def tiny(shape: Shape) -> Shape:
    """The same kind of model, so small that a CPU trains it in a moment."""
    return Shape(
        name=shape.name,
        hidden=32,
        layers=2,
        feed_forward=64,
        heads=4,
        kv_heads=2,
        vocabulary=256,
        tied=shape.tied,
        lora_rank=shape.lora_rank and 2,
    )


def make_model(shape: Shape, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A random Llama with our packed attention, activations recomputed in backward.

    LoRA is on all projections of all layers; then everything else is frozen.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    from posttrain_dist.models.attention import SDPA, register

    register()
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.feed_forward,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=SDPA)
    if shape.lora_rank:
        from peft import LoraConfig, inject_adapter_in_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=shape.lora_rank, lora_alpha=2 * shape.lora_rank, target_modules=names)
        inject_adapter_in_model(lora, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model.enable_input_require_grads()
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(lengths: list[int], masked: float, vocabulary: int) -> Any:
    """One packed row of samples; the first share of each is masked."""
    from posttrain_dist.data.collate import collate
    from posttrain_dist.flow import Example

    draw = np.random.default_rng(0)
    examples = []
    for i, length in enumerate(lengths):
        ids_L = draw.integers(vocabulary, size=length, dtype=np.int32)
        weight_L = (np.arange(length) >= masked * length).astype(np.float32)
        examples.append(Example(input_ids_L=ids_L, weight_L=weight_L, channel=0, sample_id=i))
    return collate(examples)


def model_flops(shape: Shape, model: torch.nn.Module, lengths: list[int], supervised: int) -> float:
    """The formula of this file's head."""
    sizes = {"lora": 0, "layers": 0}
    for name, parameter in model.named_parameters():
        if "layers." in name:
            sizes["lora" if "lora_" in name else "layers"] += parameter.numel()
    k, tokens = (4 if shape.lora_rank else 6), sum(lengths)
    dense = (k * sizes["layers"] + 6 * sizes["lora"]) * tokens
    head = k * shape.hidden * shape.vocabulary * supervised
    # heads · head size = hidden for these models
    return dense + head + 6.0 * shape.layers * shape.hidden * sum(n * n for n in lengths)


def measure(
    shape: Shape, lengths: list[int], masked: float, device: str, until: float, rounds: int = 5
) -> dict[str, Any]:
    """Time full optimizer steps of one packed row; ends soon after `until`."""
    from posttrain_kernels import linear_cross_entropy

    from posttrain_dist.engine import AdamW
    from posttrain_dist.engine.single import SingleEngine
    from posttrain_dist.models.policy import Policy
    from posttrain_dist.objectives.sft import Sft

    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = make_model(shape, torch.bfloat16 if on_gpu else torch.float32, device)
    batch = make_batch(lengths, masked, shape.vocabulary)
    flops = model_flops(shape, model, lengths, batch.num_targets)
    engine = SingleEngine(AdamW(lr=1e-5), torch.device(device))
    engine.attach(Policy(model, linear_cross_entropy, 1))
    engine.train(True)
    objective = Sft()
    moved = batch.to(engine.device)
    seen: dict[str, Any] = {}

    def step() -> None:
        loss = engine.forward(moved, objective, objective.count(moved))
        engine.backward(loss.total, last=True)
        seen["loss"] = loss.total.detach()
        seen["norm"] = engine.step(1e-5)

    wait: Callable[[], Any] = torch.cuda.synchronize if on_gpu else (lambda: None)
    taken = rows.take_turns({"ours": step}, rounds=rounds, wait=wait, until=until)["ours"]
    found = rows.spread(taken)
    peak = next((v for n, v in PEAK_FLOPS.items() if on_gpu and n in rows.machine()), None)
    return {
        "arm": "ours",
        "model": shape.name,
        "tokens": batch.num_tokens,
        "samples": len(lengths),
        "masked": masked,
        **found,
        "tokens_per_s": batch.num_tokens / found["p50_s"],
        "model_tflops": flops / 1e12,
        "mfu": flops / found["p50_s"] / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else rows.resident_bytes("VmHWM"),
        "loss": float(seen["loss"]),
        "norm": float(seen["norm"]),
    }


def all_steps(device: str, smoke: bool, until: float) -> list[dict[str, Any]]:
    """Both models on two rows of 8192 tokens: even samples unmasked, uneven ones 70 % masked."""
    even = [64, 64] if smoke else [1024] * 8
    uneven = [90, 30, 8] if smoke else [3000, 2000, 1200, 800, 500, 300, 200, 120, 72]
    table = []
    for shape in (LLAMA_3B, LLAMA_8B):
        for lengths, masked in ((even, 0.0), (uneven, 0.7)):
            used = tiny(shape) if smoke else shape
            row: dict[str, Any] = {"arm": "ours", "model": shape.name, "masked": masked}
            if time.monotonic() > until:
                table.append(row | {"skipped": "the time of this section was spent"})
                continue
            try:
                row = measure(used, lengths, masked, device, until)
            except (torch.OutOfMemoryError, ImportError) as error:
                row |= {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            table.append(row)
    return table
