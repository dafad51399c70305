"""Load a model under ZeRO-3 as one rank and print its private memory: rank world port folder."""

import gc
import json
import sys
import threading
import time
from pathlib import Path

import torch

from posttrain_dist import dist
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.deepspeed import DeepSpeedEngine
from posttrain_dist.metrics.memory_use import private_bytes
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.load import load_model

rank, world, port = (int(argument) for argument in sys.argv[1:4])
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))
engine = DeepSpeedEngine(
    DeepSpeed(stage=3, persistence_threshold=0), AdamW(), torch.device("cpu"), torch.float32
)
import transformers  # noqa: E402, F401  its memory is not the model's

gc.collect()
before, peak = private_bytes(), 0


def watch() -> None:
    global peak
    while True:
        peak = max(peak, private_bytes())
        time.sleep(0.005)


threading.Thread(target=watch, daemon=True).start()
model = load_model(
    ModelConfig(), Path(sys.argv[4]), dtype=torch.float32, seed=0, materialise=engine.materialise()
)
held = sum(p.ds_tensor.nbytes for p in model.parameters())
seen = {"peak": peak - before, "after": private_bytes() - before, "held": held}
print("MEMORY " + json.dumps(seen))
dist.barrier()
dist.stop()
