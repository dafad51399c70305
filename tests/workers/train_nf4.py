"""Train LoRA on an NF4 base for a few steps as one rank: rank world port model jobs (JSON)."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist import dist
from posttrain_dist.config import Lora, Quantize
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.deepspeed import DeepSpeedEngine
from posttrain_dist.flow import Batch, Example
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.finite import refuse_nonfinite
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.base import AdapterTuning

CPU = torch.device("cpu")
RATE = 1e-2
LORA = Lora(rank=4, alpha=8.0, quantize=Quantize.nf4)


def batches(step: int) -> list[Batch]:
    """Two packed rows of a step."""
    draw = np.random.default_rng(step)
    rows = []
    for row in range(2):
        examples = [
            Example(
                draw.integers(5, 200, n).astype(np.int32),
                (draw.random(n) < 0.7).astype(np.float32),
                0,
                10 * row + i,
            )
            for i, n in enumerate((9, 14 + row))
        ]
        rows.append(collate(examples))
    return rows


def policy_of(
    folder: Path, engine: Any, dtype: torch.dtype, tuning: AdapterTuning = LORA
) -> Policy:
    model = load_model(
        ModelConfig(path=str(folder)),
        folder,
        dtype=dtype,
        seed=0,
        materialise=nullcontext(),
        attach=tuning.attach,
        nf4=True,
        device=engine.device,
    )
    policy = Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 1, tuning)
    engine.attach(policy)
    refuse_nonfinite(policy, folder, prefix="causal_lm.")
    return policy


def train(engine: Any, rank: int, world: int, steps: int = 3) -> dict[str, list[float]]:
    """Losses and norms of the steps; before each, the row is evaluated without gradients."""
    losses, norms, evaluated = [], [], []
    for step in range(1, steps + 1):
        rows = batches(step)
        count = sum(row.weight_sum for row in rows)
        mine = rows[rank::world]
        engine.train(False)
        with torch.no_grad():
            total = [engine.forward(b, TokenLoss(), TokenCount(count)).total for b in mine]
            evaluated.append(float(dist.all_sum(torch.stack(total).sum().double())))
        engine.train(True)
        step_loss = torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(mine):
            loss = engine.forward(batch, TokenLoss(), TokenCount(count))
            engine.backward(loss.total, last=i == len(mine) - 1)
            step_loss += loss.total.detach().double()
        losses.append(float(dist.all_sum(step_loss)))
        norms.append(float(engine.step(RATE)))
    return {"losses": losses, "norms": norms, "evaluated": evaluated}


def adapters(engine: Any) -> dict[str, torch.Tensor]:
    """What was trained, whole."""
    return {n: t.float().clone() for n, t in engine.full_tensors(lambda name: "lora_" in name)}


if __name__ == "__main__":
    rank, world, port = (int(argument) for argument in sys.argv[1:4])
    folder, (stage, offload, dtype, out) = Path(sys.argv[4]), json.loads(sys.argv[5])
    dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))
    settings = DeepSpeed(stage=stage, persistence_threshold=0, offload=offload)
    engine = DeepSpeedEngine(settings, AdamW(clip=0.5), CPU, getattr(torch, dtype))
    policy = policy_of(folder, engine, getattr(torch, dtype))
    held = sum(getattr(p, "ds_tensor", p).numel() for p in policy.parameters())
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters())
    seen = train(engine, rank, world)
    weights = adapters(engine)
    if rank == 0:
        torch.save(weights, out)
    print("TOLD " + json.dumps({**seen, "held": held, "whole": whole}))
    dist.barrier()
    dist.stop()
