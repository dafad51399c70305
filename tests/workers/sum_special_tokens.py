"""Meter special tokens on several ranks: rank world port file. Prints what this rank got."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from posttrain_dist import dist
from posttrain_dist.flow import Loss
from posttrain_dist.metrics.special_tokens import TokenMeter
from posttrain_dist.objectives.base import TokenLoss

rank, world, port = (int(argument) for argument in sys.argv[1:4])
micro_batches = json.loads(Path(sys.argv[4]).read_text())
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))

device = torch.device("cpu")
meter = TokenMeter(["all"], {7: "seven", 3: "three"}, TokenLoss(), device)
for batch in micro_batches[rank::world]:
    columns = {name: torch.tensor(values) for name, values in batch.items()}
    total = torch.tensor(0.0)
    loss = Loss(total, torch.ones(1, 4), nll_N=columns["nll"], correct_N=columns["correct"])
    meter.add(
        loss, SimpleNamespace(labels_N=columns["label"], weight_N=columns["weight"], num_tokens=5)
    )
table, tokens = meter.flush()
again, _ = meter.flush()
left = float(sum(each.abs().sum() for each in again))
metrics = [meter.train_metrics(table), meter.eval_metrics(table)]
print(json.dumps([torch.cat(table).tolist(), tokens, left, metrics]))
