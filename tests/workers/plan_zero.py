"""What DeepSpeed holds on this rank, several cases: rank world port folder cases(JSON).

Each case makes one update and a checkpoint.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "suite"))
from zero_plan import zero_config

from posttrain_dist import dist
from posttrain_dist.build import build_policy, make_engine, pick_dtype
from posttrain_dist.checkpoint.trained_state import save_trained
from posttrain_dist.data.packs.collate import filler

rank, world, port = (int(argument) for argument in sys.argv[1:4])
folder, cases = Path(sys.argv[4]), json.loads(Path(sys.argv[5]).read_text())
shared = Path(sys.argv[5]).parent  # where all ranks write their checkpoint
process = dist.Process(rank=rank, world=world, local_rank=rank, master_port=port)
dist.start(process)


class Collectives(TorchDispatchMode):
    """Bytes that collectives made whole: of all ranks' parts together."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d."):
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            # The norm and the like are single numbers.
            self.bytes[name.split(".")[1]] += max(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def update(config):
    """Build, and train on one short row."""
    engine = make_engine(config, process, pick_dtype(config.train.dtype, config))
    policy = build_policy(config, engine, pick_dtype(config.train.dtype, config), ["all"])
    batch = filler(config.objective)
    count = config.objective.count(batch)
    engine.train(True)
    with Collectives() as sent:
        step(config, engine, batch, count)
    return engine, policy, dict(sent.bytes)


def step(config, engine, batch, count):
    """One update."""
    loss = engine.forward(batch, config.objective, count._make([1.0] * len(count)))
    engine.backward(loss.total, last=True)
    engine.step(1e-4)


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def held(engine, policy):
    """Bytes of all that stays on this rank."""
    zero, trained = engine._zero, [p for p in policy.parameters() if p.requires_grad]
    base = getattr(zero, "optimizer", zero)
    state = [s for s in base.state.values() if "exp_avg" in s]
    found = {"moments": sum(nbytes([s["exp_avg"], s["exp_avg_sq"]]) for s in state)}
    if hasattr(zero, "bit16_groups_flat"):  # stages 1 and 2
        frozen = [p for p in policy.parameters() if not p.requires_grad]
        found["weights"] = nbytes(zero.bit16_groups_flat) + nbytes(frozen)
        found["master"] = nbytes(zero.single_partition_of_fp32_groups)
    elif hasattr(zero, "fp16_partitioned_groups_flat"):  # stage 3
        found["weights"] = nbytes(p.ds_tensor for p in policy.parameters())
        found["master"] = nbytes(zero.fp32_partitioned_groups_flat)
        found["gradients"] = nbytes([zero.grad_partitions_flat_buffer])
        found["buckets"] = nbytes([bucket.buffer for bucket in zero.ipg_buckets.values()])
    else:
        found["weights"] = nbytes(policy.parameters())
        found["master"] = sum(map(nbytes, getattr(zero, "fp32_groups", [])))
    return found | {"trained": sum(getattr(p, "ds_numel", p.numel()) for p in trained)}


def written(config, engine, number):
    """Bytes of a checkpoint, all ranks together."""
    target = shared / str(number) / "state"
    if rank == 0:
        target.mkdir(parents=True)
    dist.barrier()
    if config.tuning.whole_model:
        engine.save_state(target)
    else:
        save_trained(engine, config.tuning.kept, 1, target)
    dist.barrier()
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


told = []
for number, case in enumerate(cases):
    config = zero_config(folder, case, world)
    engine, policy, sent = update(config)
    found = {"held": held(engine, policy), "written": written(config, engine, number)}
    told.append(found | {"sent": sent})
print("TOLD " + json.dumps(told))
dist.barrier()
dist.stop()
