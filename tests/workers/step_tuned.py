"""Three steps of tunings under a ZeRO stage beside the single engine: rank world port model json.

The JSON: {"stage": 3, "tunings": {name: [class, values, recompute]}}. Every rank has two
micro-batches a step, the single engine all of them. What was trained is then continued from what
would have been saved.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tuned_models import KERNELS, examples, write_folder

from posttrain_dist import dist
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.deepspeed import DeepSpeedEngine
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.models import Checkpointing, ModelConfig
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


def build(engine, tuning, recompute="none"):
    model = load_model(
        ModelConfig(path=str(folder), activation_checkpointing=Checkpointing[recompute]),
        folder,
        dtype=torch.float32,
        seed=0,
        materialise=engine.materialise(),
        attach=tuning.attach,
    )
    policy = Policy(model, KERNELS, 1, tuning)
    engine.attach(policy)
    engine.train(True)
    return policy


def train(engine, tuning, recompute, ranks):
    policy = build(engine, tuning, recompute)
    network = policy.config.to_dict()
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
    return start, {n: t.clone() for n, t in engine.full_tensors()}, losses, norms, network


def continued(engine, tuning, kept, network):
    """What the model holds when the tuning begins with these, as an adapter folder."""
    saved = tuning.to_adapter(kept, network)
    with TemporaryDirectory() as place:
        adapter = write_folder(Path(place) / "adapter", saved, folder)
        build(engine, replace(tuning, init_from=str(adapter)))
    return {n: t.clone() for n, t in engine.full_tensors()}


def distance(tensors, others):
    """The largest of the relative distances of a tensor."""
    assert tensors.keys() == others.keys(), tensors.keys() ^ others.keys()
    return max(
        float((tensor - others[name]).norm() / tensor.norm().clamp(min=1e-3))
        for name, tensor in tensors.items()
    )


told = {}
for name, (kind, values, recompute) in asked["tunings"].items():
    tuning = tuning_of(kind, values)
    single = SingleEngine(optimizer, cpu)
    start, end, losses, norms, network = train(single, tuning, recompute, range(world))
    settings = DeepSpeed(stage=asked["stage"], persistence_threshold=0)
    sharded = DeepSpeedEngine(settings, optimizer, cpu, torch.float32)
    other_start, other_end, other_losses, other_norms, _ = train(sharded, tuning, recompute, [rank])
    kept = {n: t for n, t in end.items() if tuning.kept(n)}
    again = DeepSpeedEngine(settings, optimizer, cpu, torch.float32)
    found = continued(again, tuning, kept, network)
    told[name] = {
        "losses": [losses, other_losses],
        "norms": [norms, other_norms],
        "start": distance(start, other_start),
        "end": distance(end, other_end),
        "continued": distance(kept, {n: t for n, t in found.items() if n in kept}),
        "base": distance(end, found),
        "moved": sorted(n for n in start if not torch.equal(other_start[n], other_end[n])),
        "trained": sorted(n for n in start if tuning.trained(n)),
    }
print("TOLD " + json.dumps(told))
dist.barrier()
dist.stop()
