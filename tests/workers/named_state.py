"""Optimizer state by name under ZeRO beside the single engine: rank world port model out dtype 03.

Each stage takes three steps, saves, loads into a second engine of the same stage, and both take a
fourth; then it loads what the single engine saved.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from part_tuning import KEPT, Part
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist import dist
from posttrain_dist.checkpoint.trained_state import load_trained, read_kept, save_trained
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.deepspeed import DeepSpeedEngine
from posttrain_dist.engine.optimizers import ParameterRules
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.engine.update_check import UpdateCheck
from posttrain_dist.errors import TrainingError
from posttrain_dist.flow import Example, StepInfo
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss

rank, world, port = (int(argument) for argument in sys.argv[1:4])
folder, out, dtype = Path(sys.argv[4]), Path(sys.argv[5]), getattr(torch, sys.argv[6])
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))
cpu, objective, tuning = torch.device("cpu"), TokenLoss(), Part()
optimizer = AdamW(lr=3e-3, clip=0.5, weight_decay=0.1)
rules = ParameterRules(tuning.decays, tuning.lr_ratio)


def batch(seed):
    draw = np.random.default_rng(seed)
    return collate(
        [
            Example(
                input_ids_L=draw.integers(0, 200, n).astype(np.int32),
                weight_L=(draw.random(n) < 0.7).astype(np.float32),
                channel=0,
                sample_id=i,
            )
            for i, n in enumerate(draw.integers(4, 30, 3))
        ]
    )


def build(stage, unconnected=False):
    engine = SingleEngine(optimizer, cpu, rules)
    if stage is not None:
        settings = DeepSpeed(stage=stage, persistence_threshold=40)  # norms stay whole
        engine = DeepSpeedEngine(settings, optimizer, cpu, dtype, rules)

    def prepare(model):
        tuning.attach(model)
        if unconnected:
            model.model.layers[1].mlp.extra = torch.nn.Linear(5, 7, bias=False)

    model = load_model(
        ModelConfig(path=str(folder)),
        folder,
        dtype=dtype,
        seed=0,
        materialise=engine.materialise(),
        attach=prepare,
    )
    policy = Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 1, tuning)
    engine.attach(policy)
    engine.train(True)
    return engine, policy


def step(engine, number, check=None):
    shares = range(world) if engine.world == 1 else [rank]
    everyone = [batch((number, r)) for r in range(world)]
    denominators = TokenCount(sum(objective.count(b).tokens for b in everyone))
    for r in shares:
        loss = engine.forward(batch((number, r)), objective, denominators)
        engine.backward(loss.total, last=r == shares[-1])
    engine.step(3e-3)
    if check is not None:
        check(StepInfo(number, {"train/loss": 1.0}, last=number == 3))


def make_check(engine, policy):
    return UpdateCheck(engine, policy, optimizer, rules, lambda step: 3e-3, 0)


def train(engine, policy):
    check = make_check(engine, policy)
    for number in (1, 2, 3):
        step(engine, number, check)


def save(engine, name):
    target = out / f"{name}-{sys.argv[6]}"
    if rank == 0:
        target.mkdir(parents=True)
    dist.barrier()
    digests = save_trained(engine, tuning.kept, 3, target)
    assert list(digests) == ["trained.safetensors"] * (rank == 0)
    dist.barrier()
    return target


def state(engine):
    return {
        f"{name}::{key}": tensor.clone().float()
        for name, parts in engine.named_state()
        for key, tensor in parts.items()
    }


def parameters(engine):
    return {name: tensor.clone() for name, tensor in engine.full_tensors()}


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[n], others[n]) for n in some)


def caught(work):
    try:
        work()
    except TrainingError as error:
        return error.what
    return ""


def freed(stage):
    """What the check says where a frozen weight moves."""
    engine, policy = build(stage)
    check = make_check(engine, policy)
    step(engine, 1, check)
    weight = policy.causal_lm.model.layers[1].mlp.down_proj.weight
    shard = getattr(weight, "ds_tensor", weight).data.view(-1)
    if rank == world - 1 and len(shard):
        shard[0] += 1
    return caught(lambda: [step(engine, number, check) for number in (2, 3)])


def unconnected(stage):
    engine, policy = build(stage, unconnected=True)
    policy.causal_lm.model.layers[1].mlp.extra.weight.requires_grad_()
    return caught(lambda: train(engine, policy))


single, policy = build(None)
train(single, policy)
reference, weights = state(single), parameters(single)
source = save(single, "single")
told = {}
for stage in map(int, sys.argv[7]):
    engine, policy = build(stage)
    train(engine, policy)
    saved, written = state(engine), save(engine, f"zero{stage}")
    start = parameters(engine)
    largest = {k: max(float(v.abs().max()), 1e-30) for k, v in reference.items()}
    far = max(float((saved[k] - v).abs().max()) / largest[k] for k, v in reference.items())
    second, _ = build(stage)
    load_trained(second, tuning.kept, written)
    back = equal(state(second), saved) and equal(parameters(second), start)
    for each in (engine, second):
        step(each, 4)
    third, _ = build(stage)
    load_trained(third, tuning.kept, source)
    told[stage] = {
        "keys": saved.keys() == reference.keys(),
        "far": far,
        "steps": sorted({float(v) for k, v in saved.items() if k.endswith("::step")}),
        "back": back,
        "goes on": equal(state(second), state(engine))
        and equal(parameters(second), parameters(engine)),
        "from single": equal(state(third), reference) and equal(parameters(third), weights),
        "kept": KEPT in read_kept(written),
        "freed": freed(stage),
        "unconnected": unconnected(stage),
    }
print("TOLD " + json.dumps(told))
dist.barrier()
dist.stop()
