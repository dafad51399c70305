"""Load a base in NF4 and print the private memory: rank world port folder save_to."""

import gc
import json
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from posttrain_dist.metrics.memory_use import private_bytes
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.load import load_model


def load(folder: Path) -> torch.nn.Module:
    return load_model(
        ModelConfig(path=str(folder)),
        folder,
        dtype=torch.bfloat16,
        seed=0,
        materialise=nullcontext(),
        nf4=True,
    )


folder = Path(sys.argv[4])
import bitsandbytes  # noqa: E402, F401  its memory is not the model's
import transformers.models.llama.modeling_llama  # noqa: E402, F401

gc.collect()
before, peak = private_bytes(), 0


def watch() -> None:
    global peak
    while True:
        peak = max(peak, private_bytes())
        time.sleep(0.005)


threading.Thread(target=watch, daemon=True).start()
model = load(folder)
gc.collect()
after = private_bytes() - before
held = sum(p.nbytes for p in model.parameters())
if sys.argv[5]:
    model.save_pretrained(sys.argv[5])
print("MEMORY " + json.dumps({"peak": peak - before, "after": after, "held": held}))
