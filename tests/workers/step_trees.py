"""Three steps on trees under a ZeRO stage, beside each path alone on one process.

Arguments: rank world port model json. The JSON: {"stage": 3, "recompute": "full", "lora": true}.
Every rank has trees of its own, of other shapes; the single engine has the paths of all.
"""

import json
import sys
from pathlib import Path

import torch
from forests import alone, examples
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist import dist
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.deepspeed import DeepSpeedEngine
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.models import Checkpointing, ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.lora import Lora

STEPS, MICRO = 3, 2
rank, world, port = (int(argument) for argument in sys.argv[1:4])
folder, case = Path(sys.argv[4]), json.loads(sys.argv[5])
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))
optimizer = AdamW(lr=3e-3, clip=0.5, weight_decay=0.1)
cpu, objective = torch.device("cpu"), TokenLoss()
tuning = Lora(rank=4, alpha=8.0) if case["lora"] else Full()


def trees(step, r, i):
    kinds = ("tree", "pairs", "group")
    return examples(kinds[(step + r + 2 * i) % 3], seed=100 * step + 10 * r + i)


def train(engine, ranks, cut):
    """Losses, gradient norms, and the weights behind them; `cut` makes batches of some rows."""
    config = ModelConfig(
        path=str(folder), activation_checkpointing=Checkpointing[case["recompute"]]
    )
    model = load_model(
        config,
        folder,
        dtype=torch.float32,
        seed=0,
        materialise=engine.materialise(),
        attach=tuning.attach,
    )
    policy = Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 2, tuning)
    engine.attach(policy)
    engine.train(True)
    losses, norms = [], []
    for step in range(STEPS):
        everyone = [trees(step, r, i) for r in range(world) for i in range(MICRO)]
        weight = sum(float(row.weight_L.sum()) for rows in everyone for row in rows)
        mine = [b for r in ranks for i in range(MICRO) for b in cut(trees(step, r, i))]
        total = torch.zeros(1, dtype=torch.float64)
        for i, batch in enumerate(mine):
            loss = engine.forward(batch, objective, TokenCount(weight))
            engine.backward(loss.total, last=i == len(mine) - 1)
            total += loss.total.detach().double()
        losses.append(float(dist.all_sum(total) if len(ranks) < world else total))
        norms.append(float(engine.step(3e-3)))
    return losses, norms, torch.cat([t.double().flatten() for _, t in engine.full_tensors()])


single = SingleEngine(optimizer, cpu)
losses, norms, weights = train(
    single, range(world), lambda rows: [collate([row]) for row in alone(rows)]
)
settings = DeepSpeed(stage=case["stage"], persistence_threshold=0)
sharded = DeepSpeedEngine(settings, optimizer, cpu, torch.float32)
other_losses, other_norms, other_weights = train(sharded, [rank], lambda rows: [collate(rows)])
found = {
    "losses": [losses, other_losses],
    "norms": [norms, other_norms],
    "apart": float((weights - other_weights).norm() / weights.norm()),
}
print("FOUND " + json.dumps(found))
dist.barrier()
dist.stop()
