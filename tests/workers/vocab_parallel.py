"""One rank of a head that is split over the vocabulary; saves what it got, for the test to look at.

Arguments: rank, world, port, implementation, the file of the problem, the file to write.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from posttrain_kernels import VocabShard, linear_cross_entropy, linear_logprob

rank, world, port, impl, problem, result = sys.argv[1:]
dist.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=int(world)
)
case = torch.load(problem, weights_only=True)
start, end = case["edges"][int(rank)], case["edges"][int(rank) + 1]
shard = VocabShard(start, case["edges"][-1])
found = {}
for name, function in (("loss", linear_cross_entropy), ("logprob", linear_logprob)):
    hidden = case["hidden_TD"].clone().requires_grad_()
    weight = case["weight_VD"][start:end].clone().requires_grad_()
    arguments = {**case["both"], **(case["only_loss"] if name == "loss" else {})}
    output = function(
        hidden, weight, case["labels_N"], shard=shard, impl=impl, entropy=True, **arguments
    )
    if name == "loss":
        output.loss.backward()
    else:
        (output.logprob_N * case["factor_N"] + output.entropy_N * 0.3).sum().backward()
    tensors = [x.detach() for x in output]
    found[name] = (tensors, hidden.grad, weight.grad)
torch.save(found, result)
dist.destroy_process_group()
