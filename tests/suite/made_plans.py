"""Plans made by hand, of round numbers: what a page shows of them is known without a planner."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from posttrain_dist.planner.plan import Item, Memory, Phase, PhaseName, Plan, Speed

GIB = 2**30
STATE = {Item.weights: 4 * GIB, Item.master: 8 * GIB, Item.moments: 16 * GIB}
PHASES = (
    Phase(PhaseName.load, {Item.weights: 4 * GIB, Item.loading: 2 * GIB}),
    Phase(
        PhaseName.forward,
        STATE | {Item.checkpoints: 10 * GIB, Item.head: 3 * GIB, Item.gathered: 6 * GIB},
    ),
    Phase(
        PhaseName.backward,
        STATE
        | {
            Item.gradients: 8 * GIB,
            Item.checkpoints: 10 * GIB,
            Item.activations: 12 * GIB,
            Item.gathered: 6 * GIB,
            Item.buckets: GIB,
        },
    ),
    Phase(PhaseName.update, STATE | {Item.gradients: 8 * GIB, Item.workspace: 512 * 2**20}),
    Phase(PhaseName.save, STATE | {Item.saving: GIB // 4}),
)
SPEED = Speed(
    step_s=24.0,
    terms={"compute": 21.5, "network": 9.25, "update": 0.125, "memory": 2.0},
    binds="compute",
    tokens_per_step=524_288,
    tokens_per_s=524_288 / 24,
    model_flops_share=0.4125,
    tokens=2_000_000_000,
    hours=25.4,
    gpu_hours=812.8,
    traffic_bytes={"parameters": 280 * GIB, "gradients": 70 * GIB},
    checkpoint_s=30.0,
    checkpoint_every_s=5_400.0,
    effective_share=0.985,
)
FITS = Plan(
    settings={
        "model": "llama3-70b",
        "tuning": "full",
        "engine": "ZeRO-3",
        "length": "8,192 tokens, packed",
        "checkpointing": "selective, 60 of 80 layers",
        "micro-batch": "1",
    },
    overrides=("engine=zero3", "train.micro_batch_size=1"),
    hardware={"GPUs": "8 x h100", "GPU memory": "79.6 GiB", "host memory": "2.00 TiB"},
    parameters=70_553_706_496,
    trained=70_553_706_496,
    workers=32,
    nodes=4,
    device=Memory(PHASES, slack_bytes=2 * GIB, context_bytes=GIB),  # 65 + 2 + 1
    host=Memory((Phase(PhaseName.load, {Item.loading: 140 * GIB}),), context_bytes=20 * GIB),
    capacity_bytes=80 * GIB,
    host_capacity_bytes=2048 * GIB,
    margin_bytes=4 * GIB,
    checkpoint_bytes=920 * GIB,
    export_bytes=131 * GIB,
    speed=SPEED,
    warnings=("ZeRO-3 costs more than it saves here",),
)
TIGHT = dataclasses.replace(FITS, capacity_bytes=60 * GIB, warnings=())
FULL_HOST = dataclasses.replace(FITS, host_capacity_bytes=100 * GIB, warnings=())


def as_json(plan: Plan) -> dict[str, Any]:
    """As a script reads it."""
    found: dict[str, Any] = json.loads(json.dumps(plan.to_json()))
    return found


def choice_json() -> dict[str, Any]:
    """Two that do not fit, one that is not possible, the one that is taken, one below it."""
    tried = [
        {"name": "full, ZeRO-1", "plan": as_json(TIGHT), "refused": ""},
        {"name": "full, ZeRO-2", "plan": as_json(FULL_HOST), "refused": ""},
        {"name": "full, one GPU", "plan": None, "refused": "there are 32 GPUs"},
        {"name": "full, ZeRO-3", "plan": as_json(FITS), "refused": ""},
        {"name": "lora", "plan": as_json(FITS), "refused": ""},
    ]
    return {"tried": tried, "chosen": "full, ZeRO-3"}
