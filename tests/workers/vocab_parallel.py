"""One rank of heads that are split over the vocabulary: rank world port problem...

Each problem is a file `<name>.pt`; what the rank got is saved beside it as `<name>.<rank>`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from posttrain_kernels import VocabShard, linear_cross_entropy, linear_logprob

rank, world, port = map(int, sys.argv[1:4])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
for problem in map(Path, sys.argv[4:]):
    case = torch.load(problem, weights_only=True)
    start, end = case["edges"][rank], case["edges"][rank + 1]
    options = {"shard": VocabShard(start, case["edges"][-1]), "impl": case["impl"]}
    found = {}
    for name, function in (("loss", linear_cross_entropy), ("logprob", linear_logprob)):
        hidden = case["hidden_TD"].clone().requires_grad_()
        weight = case["weight_VD"][start:end].clone().requires_grad_()
        arguments = {**options, **case["both"], **(case["only_loss"] if name == "loss" else {})}
        output = function(hidden, weight, case["labels_N"], entropy=True, **arguments)
        if name == "loss":
            output.loss.backward()
        else:
            (output.logprob_N * case["factor_N"] + output.entropy_N * 0.3).sum().backward()
        found[name] = ([x.detach() for x in output], hidden.grad, weight.grad)
    torch.save(found, problem.with_suffix(f".{rank}"))
dist.destroy_process_group()
