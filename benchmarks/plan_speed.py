"""Tokens a second that the planner says, beside those that others have published.

    python benchmarks/plan_speed.py        # seconds; then: python benchmarks/tables.py

Each row is a training of somebody else, with another program than ours, planned as the nearest that
we have: FSDP as ZeRO-3, torch.compile as model.compile, "selective" checkpointing of every second
layer, or of everything but products, as half of the layers. Where a publication leaves the length
or the checkpointing out, it is what its memory says. The shares of `planner/speed/rates.py` were
fitted to these rows, but for `HELD_OUT`, which was taken in afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rows

from posttrain_dist.config import (
    AdamW,
    DeepSpeed,
    Hardware,
    Local,
    Lora,
    Quantize,
    RunConfig,
    Sft,
    Single,
    Slurm,
)
from posttrain_dist.config.hardware import with_nodes
from posttrain_dist.models import Checkpointing, ModelConfig
from posttrain_dist.models.folder import check_folder, resolve
from posttrain_dist.models.shape import ModelShape
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.make_job import make_job
from posttrain_dist.planner.speed.step_time import step_time
from posttrain_dist.tuning.base import Tuning
from posttrain_dist.tuning.full import Full

# ----------------------------------------------------------------------------------- models


def _llama(hidden: int, layers: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": mlp,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    }


def _mpt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """MPT has the matrices of GPT-NeoX, and ALiBi in place of rotations."""
    return {
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": 50368,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": True,
    }


# Those of which no config.json comes with the package.
MODELS = {
    "llama-34b": _llama(8192, 48, 64, 22016),
    "mistral-7b-v0.2": _llama(4096, 32, 32, 14336),  # without a window
    "mpt-125m": _mpt(768, 12, 12),
    "mpt-760m": _mpt(1536, 24, 12),
    "mpt-1b": _mpt(2048, 24, 16),
    "mpt-3b": _mpt(2560, 32, 20),
    "mpt-7b": _mpt(4096, 32, 32),
    "mpt-13b": _mpt(5120, 40, 40),
    "mpt-30b": _mpt(7168, 48, 56),
    "mpt-70b": _mpt(8192, 80, 64),
}
HARDWARE = {
    "h100": Hardware(gpu="h100", host_memory_gib=1800, cpus_per_node=96, network_gb_s=50),
    "a100_80": Hardware(gpu="a100_80", host_memory_gib=1000, cpus_per_node=96, network_gb_s=25),
    "a100_40": Hardware(gpu="a100_40", host_memory_gib=1000, cpus_per_node=96, network_gb_s=25),
    "rtx4090": Hardware(gpu="rtx4090", host_memory_gib=128, cpus_per_node=32),
    "rtx3090": Hardware(gpu="rtx3090", host_memory_gib=128, cpus_per_node=32),
}

# ------------------------------------------------------------------------------ publications

TITAN = "torchtitan, benchmarks/llama3_h100_202412 (500 W, 2.4 TB/s)"
TITAN_A100 = "torchtitan, docs/performance.md, 2024"
MOSAIC = "llm-foundry, scripts/train/benchmarking, 2023"
IBM = "fms-fsdp, README"
HF = "Hugging Face, From DeepSpeed to FSDP and back again, 2024"
TUNE = "torchtune, README, 2024"
ANSWER = "fsdp_qlora, benchmarks_03_2024"
NEMO = "NeMo Automodel, performance summary"
PRIME = "prime-rl, Qwen3-4B"
TRL = "TRL, 8B LoRA: 9.6k to 10.3k"


@dataclass(frozen=True, slots=True)
class Anchor:
    """One published training: tokens a second of each GPU."""

    source: str
    model: str
    gpu: str
    gpus: int
    length: int
    micro: int
    published: float
    accumulation: int = 1
    recomputed: float = 0.0  # share of the layers
    compiled: bool = True
    rank: int | None = None  # of LoRA; None: full
    nf4: bool = False
    offload: bool = False


HELD_OUT = (MOSAIC, "a100_40")
_ALL: dict[str, Any] = {"recomputed": 1.0}
_HALF: dict[str, Any] = {"recomputed": 0.5}
_QLORA: dict[str, Any] = {"rank": 8, "nf4": True, "compiled": False, **_ALL}
ANCHORS = (
    Anchor(TITAN, "llama3-8b", "h100", 8, 8192, 2, 6667, **_HALF),
    Anchor(TITAN, "llama3-8b", "h100", 8, 8192, 2, 5762, compiled=False, **_HALF),
    Anchor(TITAN, "llama3-8b", "h100", 128, 8192, 2, 6514, **_HALF),
    Anchor(TITAN_A100, "llama3-8b", "a100_80", 64, 8192, 1, 2904, **_HALF),
    Anchor(TITAN_A100, "llama3-70b", "a100_80", 64, 8192, 1, 331, **_ALL),
    Anchor(TITAN_A100, "llama2-13b", "a100_80", 64, 4096, 2, 2162),
    Anchor(TITAN_A100, "llama2-13b", "a100_80", 64, 4096, 2, 1914, **_HALF),
    Anchor(TITAN_A100, "llama2-70b", "a100_80", 64, 4096, 2, 353, **_ALL),
    Anchor(IBM, "llama2-7b", "a100_80", 128, 4096, 2, 3760),
    Anchor(IBM, "llama2-13b", "a100_80", 128, 4096, 1, 1700),
    Anchor(IBM, "llama-34b", "a100_80", 128, 4096, 8, 772, **_ALL),
    Anchor(IBM, "llama2-70b", "a100_80", 128, 4096, 6, 380, **_ALL),
    Anchor(HF, "llama2-7b", "a100_80", 4, 4096, 8, 3094, compiled=False, **_ALL),
    Anchor(MOSAIC, "mpt-70b", "h100", 64, 2048, 8, 1039, accumulation=4, **_ALL),
    Anchor(MOSAIC, "mpt-30b", "h100", 8, 2048, 3, 2002, accumulation=21, **_ALL),
    Anchor(MOSAIC, "mpt-30b", "h100", 8, 8192, 1, 1384, accumulation=21, **_ALL),
    Anchor(MOSAIC, "mpt-30b", "h100", 32, 2048, 14, 2308, accumulation=3, **_ALL),
    Anchor(MOSAIC, "mpt-13b", "h100", 8, 4096, 10, 4717, accumulation=3, **_ALL),
    Anchor(MOSAIC, "mpt-13b", "h100", 64, 2048, 2, 4800),
    Anchor(MOSAIC, "mpt-7b", "h100", 8, 2048, 6, 10643),
    Anchor(MOSAIC, "mpt-7b", "h100", 8, 8192, 8, 6935, accumulation=2, **_ALL),
    Anchor(MOSAIC, "mpt-3b", "h100", 8, 1024, 20, 27046, accumulation=6),
    Anchor(MOSAIC, "mpt-1b", "h100", 8, 2048, 14, 45455),
    Anchor(MOSAIC, "mpt-760m", "h100", 8, 2048, 24, 63147, accumulation=2),
    Anchor(MOSAIC, "mpt-70b", "a100_80", 64, 2048, 8, 410, accumulation=4, **_ALL),
    Anchor(MOSAIC, "mpt-70b", "a100_80", 32, 2048, 2, 373, accumulation=16, **_ALL),
    Anchor(MOSAIC, "mpt-30b", "a100_80", 8, 2048, 3, 916, accumulation=21, **_ALL),
    Anchor(MOSAIC, "mpt-13b", "a100_80", 8, 2048, 2, 2262, accumulation=3),
    Anchor(MOSAIC, "mpt-13b", "a100_80", 8, 8192, 5, 1795, accumulation=3, **_ALL),
    Anchor(MOSAIC, "mpt-7b", "a100_80", 8, 2048, 6, 4641, accumulation=2),
    Anchor(MOSAIC, "mpt-3b", "a100_80", 8, 2048, 10, 10811, accumulation=2),
    Anchor(MOSAIC, "mpt-1b", "a100_80", 8, 2048, 14, 20513, accumulation=4),
    Anchor(MOSAIC, "mpt-125m", "a100_80", 8, 2048, 32, 141737, accumulation=2),
    Anchor(MOSAIC, "mpt-70b", "a100_40", 128, 2048, 4, 376, **_ALL),
    Anchor(MOSAIC, "mpt-30b", "a100_40", 128, 2048, 6, 865, **_ALL),
    Anchor(MOSAIC, "mpt-13b", "a100_40", 128, 2048, 16, 1972, **_ALL),
    Anchor(MOSAIC, "mpt-13b", "a100_40", 8, 4096, 2, 1603, accumulation=16, **_ALL),
    Anchor(MOSAIC, "mpt-7b", "a100_40", 128, 2048, 18, 3623, **_ALL),
    Anchor(MOSAIC, "mpt-7b", "a100_40", 8, 8192, 3, 2887, accumulation=4, **_ALL),
    Anchor(MOSAIC, "mpt-3b", "a100_40", 8, 4096, 2, 8777, accumulation=8),
    Anchor(MOSAIC, "mpt-3b", "a100_40", 128, 2048, 6, 9538),
    Anchor(NEMO, "llama3-8b", "h100", 1, 4096, 1, 12473, accumulation=8, rank=16),
    Anchor(NEMO, "qwen2.5-7b", "h100", 1, 4096, 1, 14110, accumulation=8, rank=16),
    Anchor(NEMO, "llama3-70b", "h100", 8, 4096, 1, 1092, accumulation=4, rank=16, **_ALL),
    Anchor(TRL, "llama3-8b", "h100", 1, 4096, 1, 9950, accumulation=8, rank=16, compiled=False),
    Anchor(PRIME, "qwen3-4b", "h100", 1, 16384, 1, 6229, rank=16, **_ALL),
    Anchor(TUNE, "llama3-8b", "rtx4090", 1, 2048, 2, 1650, **_ALL),
    Anchor(TUNE, "llama3-8b", "rtx4090", 1, 2048, 2, 3083, rank=8, **_ALL),
    Anchor(TUNE, "llama3-8b", "rtx4090", 1, 2048, 2, 2413, rank=8, nf4=True, **_ALL),
    Anchor(TUNE, "llama3-70b", "a100_80", 8, 2048, 2, 437, rank=8, **_ALL),
    Anchor(TUNE, "llama3-70b", "a100_80", 8, 2048, 2, 196, offload=True, **_ALL),
    Anchor(ANSWER, "llama2-70b", "h100", 1, 2048, 8, 786, **_QLORA),
    Anchor(ANSWER, "llama2-70b", "a100_40", 1, 2048, 4, 390, **_QLORA),
    Anchor(ANSWER, "llama2-7b", "rtx3090", 1, 2048, 8, 1198, **_QLORA),
    Anchor(ANSWER, "llama2-7b", "rtx4090", 1, 2048, 8, 2330, **_QLORA),
    Anchor(ANSWER, "mistral-7b-v0.2", "rtx4090", 1, 2048, 12, 2171, **_QLORA),
    Anchor(ANSWER, "mistral-7b-v0.2", "rtx4090", 1, 24576, 1, 1613, **_QLORA),
)

# ------------------------------------------------------------------------------------- plans


def planned(anchor: Anchor) -> float:
    """Tokens a second of each GPU, as the planner says."""
    job = job_of(anchor)
    tokens = job.batch_size * anchor.length
    return tokens / step_time(job).step_s / anchor.gpus


def job_of(anchor: Anchor) -> Job:
    """The nearest run of ours."""
    if anchor.model not in MODELS:
        return _job(anchor, f"shape:{anchor.model}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[anchor.model]), encoding="utf-8")
        return _job(anchor, folder)


def _job(anchor: Anchor, path: str) -> Job:
    shape = ModelShape.of(check_folder(resolve(path), need_weights=False))
    config = _config(anchor, path, math.ceil(anchor.recomputed * shape.num_layers))
    return make_job(config, find_machine(config, plans_only=True))


def _config(anchor: Anchor, path: str, layers: int) -> RunConfig:
    mode = Checkpointing.selective if layers else Checkpointing.none
    tuning: Tuning = Full()
    if anchor.rank is not None:
        tuning = Lora(rank=anchor.rank, quantize=Quantize.nf4 if anchor.nf4 else Quantize.none)
    hardware = replace(HARDWARE[anchor.gpu], gpus_per_node=min(8, anchor.gpus))
    config = RunConfig(
        model=ModelConfig(
            path=path,
            compile=anchor.compiled,
            activation_checkpointing=mode,
            checkpoint_layers=layers or None,
        ),
        objective=Sft(),
        tuning=tuning,
        optimizer=AdamW(lr=1e-4),
        engine=Single() if anchor.gpus == 1 else DeepSpeed(stage=3, offload=anchor.offload),
        cluster=Local() if anchor.gpus == 1 else Slurm(nodes=math.ceil(anchor.gpus / 8)),
        hardware=hardware,
    )
    config.data.max_length = anchor.length
    config.train.micro_batch_size = anchor.micro
    config.train.batch_size = anchor.gpus * anchor.micro * anchor.accumulation
    config.cluster = with_nodes(config.cluster, hardware)
    return config


def speed_rows() -> list[dict[str, Any]]:
    """One row a training, in the order of `ANCHORS`."""
    found = []
    for anchor in ANCHORS:
        tokens_per_s = planned(anchor)
        found.append(
            {
                "arm": title(anchor),
                "published_by": anchor.source,
                "published": anchor.published,
                "planned": tokens_per_s,
                "ratio": tokens_per_s / anchor.published,
                "fitted": (anchor.source, anchor.gpu) != HELD_OUT,
            }
        )
    return found


def main() -> None:
    """Plan all, and leave the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    folder = parser.parse_args().results
    facts = rows.facts(("posttrain-dist",))
    found = speed_rows()
    rows.append("plan_speed", [{**facts, **row} for row in found], folder)
    for row in found:
        print(f"{row['published']:>9,.0f} {row['planned']:>9,.0f} {row['ratio']:.2f}  {row['arm']}")
    ratios = [row["ratio"] for row in found]
    near = [sum(1 / far <= ratio <= far for ratio in ratios) for far in (1.25, 1.35)]
    print(
        f"{len(ratios)} trainings: median ratio {statistics.median(ratios):.2f}, {near[0]} "
        f"within 25 %, {near[1]} within 35 %; {min(ratios):.2f} to {max(ratios):.2f}"
    )


def title(anchor: Anchor) -> str:
    """As "llama3-8b full, 8 x h100, 2 x 8,192 tokens, half recomputed"."""
    method = "full" if anchor.rank is None else "QLoRA" if anchor.nf4 else "LoRA"
    again = {0.0: "", 0.5: ", half recomputed", 1.0: ", recomputed"}[anchor.recomputed]
    return (
        f"{anchor.model} {method}{' offload' * anchor.offload}, {anchor.gpus} x {anchor.gpu}, "
        f"{anchor.micro} x {anchor.length:,} tokens{again}{', eager' * (not anchor.compiled)}"
    )


if __name__ == "__main__":
    main()
