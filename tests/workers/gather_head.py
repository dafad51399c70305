"""How often ZeRO-3 gathers the head's weight for many chunks: rank world port model."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist import dist
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.deepspeed import DeepSpeedEngine
from posttrain_dist.flow import Example
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss

rank, world, port = (int(argument) for argument in sys.argv[1:4])
folder = Path(sys.argv[4])
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))
settings = DeepSpeed(stage=3, persistence_threshold=0)
engine = DeepSpeedEngine(settings, AdamW(), torch.device("cpu"), torch.float32)
materialise = engine.materialise()
config = ModelConfig(path=str(folder))
model = load_model(config, folder, dtype=torch.float32, seed=0, materialise=materialise)
policy = Policy(model, HeadKernels(partial(linear_cross_entropy, chunk_rows=4), linear_logprob), 1)
engine.attach(policy)
engine.train(True)
tokens = np.random.default_rng(0).integers(0, 200, 40).astype(np.int32)
batch = collate([Example(tokens, np.ones(40, np.float32), 0, 0)])

weight = policy.head.module.weight
free, freed = weight.partition, []
weight.partition = lambda *a, **k: (freed.append(weight.numel()), free(*a, **k))[1]
shard = weight.numel()
loss = engine.forward(batch, TokenLoss(), TokenCount(39.0))
after_forward = len(freed)
engine.backward(loss.total, last=True)
told = {
    "shard": shard,
    "whole": weight.ds_numel,
    "freed": freed[:after_forward],
    "rows": len(batch.labels_N),
    "norm": float(engine.step(0.0)),
}
print("TOLD " + json.dumps(told))
dist.barrier()
dist.stop()
