"""The first step of each preference objective under ZeRO: rank world port model stage names."""

import json
import sys
from pathlib import Path

import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist import dist
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.deepspeed import DeepSpeedEngine
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy

sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))
from preferences import first_steps

rank, world, port = (int(argument) for argument in sys.argv[1:4])
folder = Path(sys.argv[4])
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))
settings = DeepSpeed(stage=int(sys.argv[5]), persistence_threshold=0)
engine = DeepSpeedEngine(settings, AdamW(), torch.device("cpu"), torch.float32)
materialise, config = engine.materialise(), ModelConfig(path=str(folder))
model = load_model(config, folder, dtype=torch.float32, seed=0, materialise=materialise)
engine.attach(Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 2))
print("FIRST STEPS " + json.dumps(first_steps(engine, sys.argv[6:], rank, world)))
dist.barrier()
dist.stop()
