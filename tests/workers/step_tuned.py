"""Three steps of tunings under a ZeRO stage beside the single engine: rank world port model json.

The JSON: {"stage": 3, "tunings": {name: [class, values]}}. Every rank has two micro-batches a step,
the single engine all of them.
"""

import json
import sys
from pathlib import Path

import torch
from tuned_models import KERNELS, examples

from posttrain_dist import dist
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.deepspeed import DeepSpeedEngine
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.ia3 import Ia3
from posttrain_dist.tuning.lora import Lora, LoraInit

STEPS, MICRO = 3, 2
rank, world, port = (int(argument) for argument in sys.argv[1:4])
folder, asked = Path(sys.argv[4]), json.loads(sys.argv[5])
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))
optimizer = AdamW(lr=1e-2, clip=0.5, weight_decay=0.1)
cpu, objective = torch.device("cpu"), TokenLoss()


def tuning_of(kind, values):
    if "init" in values:
        values = {**values, "init": LoraInit[values["init"]]}
    return {"Lora": Lora, "Ia3": Ia3}[kind](**values)


def batch(step, r, i):
    return collate(examples((9, 14, 5), seed=100 * step + 10 * r + i))


def train(engine, tuning, ranks):
    model = load_model(
        ModelConfig(path=str(folder)),
        folder,
        dtype=torch.float32,
        seed=0,
        materialise=engine.materialise(),
        attach=tuning.attach,
    )
    policy = Policy(model, KERNELS, 1, tuning)
    engine.attach(policy)
    engine.train(True)
    start = {n: t.clone() for n, t in engine.full_tensors()}
    losses, norms = [], []
    for step in range(STEPS):
        mine = [batch(step, r, i) for r in ranks for i in range(MICRO)]
        everyone = [batch(step, r, i) for r in range(world) for i in range(MICRO)]
        denominators = TokenCount(sum(objective.count(b).tokens for b in everyone))
        total = torch.zeros(1, dtype=torch.float64)
        for i, one in enumerate(mine):
            loss = engine.forward(one, objective, denominators)
            engine.backward(loss.total, last=i == len(mine) - 1)
            total += loss.total.detach().double()
        losses.append(float(dist.all_sum(total) if len(ranks) < world else total))
        norms.append(float(engine.step(1e-2)))
    return start, {n: t.clone() for n, t in engine.full_tensors()}, losses, norms


def distance(tensors, others):
    """The largest of the relative distances of a tensor."""
    assert tensors.keys() == others.keys(), tensors.keys() ^ others.keys()
    return max(
        float((tensor - others[name]).norm() / tensor.norm().clamp(min=1e-3))
        for name, tensor in tensors.items()
    )


told = {}
for name, (kind, values) in asked["tunings"].items():
    tuning = tuning_of(kind, values)
    start, end, losses, norms = train(SingleEngine(optimizer, cpu), tuning, range(world))
    settings = DeepSpeed(stage=asked["stage"], persistence_threshold=0)
    sharded = DeepSpeedEngine(settings, optimizer, cpu, torch.float32)
    other_start, other_end, other_losses, other_norms = train(sharded, tuning, [rank])
    told[name] = {
        "losses": [losses, other_losses],
        "norms": [norms, other_norms],
        "start": distance(start, other_start),
        "end": distance(end, other_end),
        "moved": sorted(n for n in start if not torch.equal(other_start[n], other_end[n])),
        "trained": sorted(n for n in start if tuning.trained(n)),
    }
print("TOLD " + json.dumps(told))
dist.barrier()
dist.stop()
