"""Configs and jobs of DeepSpeed runs on CPUs, for what is planned and measured side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain_dist.config import (
    AdamW,
    DataConfig,
    DeepSpeed,
    Dtype,
    Full,
    Lora,
    ModelConfig,
    Ray,
    RunConfig,
    Sft,
    TrainConfig,
    complete,
)
from posttrain_dist.models import Checkpointing
from posttrain_dist.objectives.preference.reward import Reward
from posttrain_dist.planner.job import Job, Machine
from posttrain_dist.planner.make_job import make_job

GIB = 1 << 30
MACHINE = Machine(
    gpu=None,
    gpus_per_node=0,
    gpu_memory_bytes=0,
    host_memory_bytes=64 * GIB,
    cpus_per_node=8,
    link_bytes_s=1e9,
    network_bytes_s=1e9,
    host_link_bytes_s=1e9,
    storage_bytes_s=1e9,
    node_failure_s=1e7,
    margin=0.0,
)


def zero_config(folder: Path, case: dict[str, Any], world: int) -> RunConfig:
    """A completed config of the model in `folder` on `world` CPU ranks.

    Args:
        case: stage, dtype, rank (LoRA's; 0: full), length, threshold, recompute, json, reward.
    """
    rank = case.get("rank", 0)
    recompute = Checkpointing[case.get("recompute", "none")]
    return complete(
        RunConfig(
            model=ModelConfig(path=str(folder), activation_checkpointing=recompute),
            data=DataConfig(max_length=case.get("length", 128)),
            objective=Reward() if case.get("reward") else Sft(),
            tuning=Lora(rank=rank) if rank else Full(),
            engine=DeepSpeed(
                stage=case["stage"],
                persistence_threshold=case.get("threshold", 0),
                config=case.get("json"),
            ),
            cluster=Ray(workers=world),
            train=TrainConfig(
                dtype=Dtype[case.get("dtype", "float32")],
                batch_size=world * case.get("accumulation", 1),
                steps=1,
            ),
        )
    )


def zero_job(config: RunConfig) -> Job:
    """The job of such a config on machines without GPUs."""
    return make_job(config, MACHINE)


def plan_job(
    shape: str,
    engine: Any,
    tuning: Any,
    *,
    gpus: int,
    workers: int | None = None,
    optimizer: AdamW | None = None,
) -> Job:
    """A job of a known shape on nodes of H100, one short row of 512 tokens a rank."""
    workers = workers or gpus
    config = complete(
        RunConfig(
            model=ModelConfig(path=f"shape:{shape}"),
            data=DataConfig(max_length=512),
            objective=Sft(),
            tuning=tuning,
            optimizer=optimizer or AdamW(),
            engine=engine,
            cluster=Ray(workers=workers),
            train=TrainConfig(dtype=Dtype.bfloat16, batch_size=workers, steps=1),
        )
    )
    node = replace(MACHINE, gpu="h100", gpus_per_node=gpus, gpu_memory_bytes=80 * GIB)
    return replace(make_job(config, node), local_workers=min(workers, gpus))
