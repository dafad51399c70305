"""Configs of one node of made-up H100s, the machine that they are planned for, and a wide model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from posttrain_dist.config import (
    AutoEngine,
    AutoTuning,
    DataConfig,
    Hardware,
    ModelConfig,
    Ray,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.planner.job import Machine
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.methods import Method, methods
from posttrain_dist.planner.plan import Plan
from posttrain_dist.planner.search import Search

# As wide as an 8B model, with few layers: 0.9B parameters whose plans take no time.
WIDE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 16384,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
}

# The fallbacks on several GPUs of one node, by name.
LADDER = [
    "full ZeRO-1",
    "full ZeRO-2",
    "full ZeRO-3",
    "full ZeRO-3 + CPU offload",
    "LoRA",
    "QLoRA",
    "QLoRA + paged optimizer on one GPU",
]
OFFLOAD = LADDER[3]
RECOMPUTED = "model.activation_checkpointing=full"


@cache
def wide_model() -> str:
    """A model folder that holds a config.json and nothing else."""
    folder = Path(mkdtemp(prefix="posttrain-wide-"))
    (folder / "config.json").write_text(json.dumps(WIDE), encoding="utf-8")
    return str(folder)


def planned(
    gib: float = 80.0,
    gpus: int = 4,
    shape: str | None = None,
    host_gib: float = 500.0,
    **slots: object,
) -> tuple[RunConfig, Machine]:
    """A completed config, and the machine that it is planned for."""
    hardware = Hardware(
        gpu="h100",
        gpus_per_node=gpus,
        gpu_memory_gib=gib,
        host_memory_gib=host_gib,
        cpus_per_node=32,
    )
    values = {
        "model": ModelConfig(path=shape or wide_model()),
        "tuning": AutoTuning(),
        "engine": AutoEngine(),
        "cluster": Ray(),
        "hardware": hardware,
        "data": DataConfig(max_length=2048),
        "train": TrainConfig(batch_size=8),
        **slots,
    }
    config = complete(RunConfig(**values))  # type: ignore[arg-type]
    return config, find_machine(config, plans_only=True)


@cache
def needs() -> dict[str, float]:
    """GiB of a GPU, with the margin, that each takes with its smallest settings."""
    config, machine = planned()
    search = Search(config, machine)
    plans = {each.name: smallest(search, each) for each in methods(config, machine)}
    return {
        name: min(plan.device.total_bytes for plan in found) / 0.96 / 2**30
        for name, found in plans.items()
    }


def smallest(search: Search, method: Method) -> list[Plan]:
    """Plans of a method with one pack after the other, and with all of them at once."""
    packs = search.config.train.batch_size
    return [
        search.plan((*words, f"train.micro_batch_size={size}", RECOMPUTED))
        for words in method.ways
        for size in (1, packs)
    ]


def room(name: str) -> dict[str, Any]:
    """Memory that is enough for one, and for none before it; the offload finds too little host."""
    before = [each for each in LADDER[: LADDER.index(name)] if each != OFFLOAD]
    least = min((needs()[each] for each in before), default=1.1 * needs()[name])
    assert needs()[name] < least
    low_host = LADDER.index(name) > LADDER.index(OFFLOAD)
    return {"gib": (needs()[name] + least) / 2, "host_gib": 25.0 if low_host else 500.0}
