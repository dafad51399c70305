"""Three steps of an objective with extra fields under ZeRO-3: rank world port model."""

import json
import sys
from pathlib import Path

import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist import dist
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.deepspeed import DeepSpeedEngine
from posttrain_dist.loop import fit
from posttrain_dist.metrics.channels import ChannelMeter
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy

sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))
from ratio import Ratio, Units

rank, world, port = (int(argument) for argument in sys.argv[1:4])
folder = Path(sys.argv[4])
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))
settings = DeepSpeed(stage=3, persistence_threshold=0)
engine = DeepSpeedEngine(settings, AdamW(), torch.device("cpu"), torch.float32)
materialise, config = engine.materialise(), ModelConfig(path=str(folder))
model = load_model(config, folder, dtype=torch.float32, seed=0, materialise=materialise)
engine.attach(Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 2))
meter = ChannelMeter(["even", "odd"], Ratio(), engine.device)
infos = fit(
    engine=engine,
    source=Units(rank, world),
    objective=Ratio(),
    meter=meter,
    describe=meter.train_metrics,
    learning_rate=lambda step: 1e-2,
    steps=3,
)
print("METRICS " + json.dumps([info.metrics for info in infos][1:]))
dist.barrier()
dist.stop()
