"""Three steps of ZeRO-3 beside the single engine, several cases: rank world port model json.

Every rank has two micro-batches a step, the single engine all of them.
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

STEPS, MICRO = 3, 2
rank, world, port = (int(argument) for argument in sys.argv[1:4])
folder, own_json = Path(sys.argv[4]), sys.argv[5]
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))
optimizer = AdamW(lr=3e-3, clip=0.5, weight_decay=0.1)
cpu, objective = torch.device("cpu"), TokenLoss()


def batch(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, 30, 3)
    return collate(
        [
            Example(
                input_ids_L=draw.integers(0, 200, n).astype(np.int32),
                weight_L=(draw.random(n) < 0.7).astype(np.float32),
                channel=0,
                sample_id=i,
            )
            for i, n in enumerate(lengths)
        ]
    )


def build(engine, recompute, frozen):
    config = ModelConfig(path=str(folder), activation_checkpointing=Checkpointing[recompute])
    model = load_model(
        config, folder, dtype=torch.float32, seed=0, materialise=engine.materialise()
    )
    model.get_input_embeddings().weight.requires_grad_(not frozen)
    policy = Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 1)
    engine.attach(policy)
    engine.train(True)
    return policy


def train(engine, ranks):
    told = {"losses": [], "norms": []}
    for step in range(STEPS):
        mine = [batch((step, r, i)) for r in ranks for i in range(MICRO)]
        everyone = [batch((step, r, i)) for r in range(world) for i in range(MICRO)]
        denominators = TokenCount(sum(objective.count(b).tokens for b in everyone))
        total = torch.zeros(1, dtype=torch.float64)
        for i, one in enumerate(mine):
            loss = engine.forward(one, objective, denominators)
            engine.backward(loss.total, last=i == len(mine) - 1)
            total += loss.total.detach().double()
        told["losses"].append(float(dist.all_sum(total) if len(ranks) < world else total))
        told["norms"].append(float(engine.step(3e-3)))
    return told


def flat(engine):
    return torch.cat([t.double().flatten() for _, t in engine.full_tensors()])


def case(recompute="none", frozen=False, config=None):
    single = SingleEngine(optimizer, cpu)
    build(single, recompute, frozen)
    start = flat(single)
    told = {"single": train(single, range(world))}
    settings = DeepSpeed(stage=3, persistence_threshold=0, config=config)
    sharded = DeepSpeedEngine(settings, optimizer, cpu, torch.float32)
    policy = build(sharded, recompute, frozen)
    told["sharded"] = train(sharded, [rank])
    reference = flat(single)
    return {
        **told,
        "distance": float((flat(sharded) - reference).norm()),
        "moved": float((reference - start).norm()),
        "size": float(reference.norm()),
        "leaves": [type(m).__name__ for m in policy.modules() if getattr(m, "_z3_leaf", False)],
        "bucket": sharded._zero.reduce_bucket_size,
        "scatter": sharded._zero.reduce_scatter,
    }


cases = {
    "plain": case(),
    "recomputed": case(recompute="full"),
    "frozen": case(frozen=True),
    "own json": case(config=own_json),
}
print("TOLD " + json.dumps(cases))
dist.barrier()
dist.stop()
