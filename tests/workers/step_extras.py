"""Three steps of two ranks beside the single engine: rank world port model.

Bottleneck adapters, and added tokens with noise on the embeddings, by LoRA and in full.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist import dist
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.deepspeed import DeepSpeedEngine
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.flow import Example
from posttrain_dist.models import Checkpointing, ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.bottleneck import Bottleneck, Placement
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.lora import Lora

STEPS = 3
rank, world, port = (int(argument) for argument in sys.argv[1:4])
folder = Path(sys.argv[4])
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))
optimizer = AdamW(lr=3e-3, clip=0.5, weight_decay=0.1)
cpu, objective = torch.device("cpu"), TokenLoss()
NEW = 5  # tokens; the base has three rows that no token uses


def batch(seed, largest):
    draw = np.random.default_rng(seed)
    rows = []
    for i, n in enumerate(draw.integers(4, 30, 3)):
        ids_L = draw.integers(0, largest, n).astype(np.int32)
        rows.append(Example(ids_L, (draw.random(n) < 0.7).astype(np.float32), 0, i))
    return collate(rows)


def build(engine, tuning, options, alpha):
    config = ModelConfig(
        path=str(folder),
        activation_checkpointing=Checkpointing[options.get("recompute", "none")],
        add_tokens=options.get("tokens", []),
    )
    model = load_model(
        config,
        folder,
        dtype=torch.float32,
        seed=0,
        materialise=engine.materialise(),
        attach=tuning.attach,
    )
    kernels = HeadKernels(linear_cross_entropy, linear_logprob)
    policy = Policy(model, kernels, 1, tuning, neftune_alpha=alpha)
    engine.attach(policy)
    engine.train(True)
    return policy


def train(engine, ranks, largest):
    told = {"losses": [], "norms": []}
    for step in range(STEPS):
        everyone = [batch((step, r), largest) for r in range(world)]
        denominators = TokenCount(sum(objective.count(b).tokens for b in everyone))
        total = torch.zeros(1, dtype=torch.float64)
        for i, r in enumerate(ranks):
            torch.manual_seed(1000 * step + r)  # of the noise
            loss = engine.forward(everyone[r], objective, denominators)
            engine.backward(loss.total, last=i == len(ranks) - 1)
            total += loss.total.detach().double()
        told["losses"].append(float(dist.all_sum(total) if len(ranks) < world else total))
        told["norms"].append(float(engine.step(3e-3)))
    return told


def flat(engine, tuning):
    kept = [(n, t) for n, t in engine.full_tensors(tuning.kept)]
    return torch.cat([t.double().flatten() for _, t in kept])


def case(stage, tuning, alpha=0.0, largest=200, **options):
    single = SingleEngine(optimizer, cpu)
    build(single, tuning, options, alpha)
    start = flat(single, tuning)
    told = {"single": train(single, range(world), largest)}
    settings = DeepSpeed(stage=stage, persistence_threshold=0)
    sharded = DeepSpeedEngine(settings, optimizer, cpu, torch.float32)
    build(sharded, tuning, options, alpha)
    began = flat(sharded, tuning)
    told["sharded"] = train(sharded, [rank], largest)
    reference = flat(single, tuning)
    return {
        **told,
        "began": float((began - start).norm()),
        "distance": float((flat(sharded, tuning) - reference).norm()),
        "moved": float((reference - start).norm()),
        "size": float(reference.norm()),
        "elements": len(reference),
    }


houlsby = Bottleneck(placement=Placement.houlsby, reduction=4)
parallel = Bottleneck(placement=Placement.parallel, reduction=4)
grown = {"tokens": [f"<new-{i}>" for i in range(NEW)], "alpha": 5.0, "largest": 298}
cases = {
    "bottleneck zero1": case(1, houlsby),
    "bottleneck zero3": case(3, houlsby),
    "bottleneck zero3 recomputed": case(3, parallel, recompute="full"),
    "tokens lora zero2": case(2, Lora(rank=4, targets="attention"), **grown),
    "tokens lora zero3": case(3, Lora(rank=4, targets="attention"), **grown),
    "tokens zero1": case(1, Full(), **grown),
    "tokens zero3": case(3, Full(), **grown),
}
print("TOLD " + json.dumps(cases))
dist.barrier()
dist.stop()
