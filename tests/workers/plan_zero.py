"""What DeepSpeed holds and allocates, several cases: rank world port folder cases(JSON).

A case with "peaks" runs updates and tells the peak of each phase too.
"""

import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "suite"), str(Path(__file__).parents[2])]
from zero_plan import zero_config  # noqa: E402

from benchmarks.measured_memory import measure  # noqa: E402
from posttrain_dist import dist  # noqa: E402
from posttrain_dist.build import build_policy, make_engine, make_probe  # noqa: E402, F401

rank, world, port = (int(argument) for argument in sys.argv[1:4])
folder = Path(sys.argv[4])
process = dist.Process(rank=rank, world=world, local_rank=rank, master_port=port)
dist.start(process)


def nbytes(tensors):
    return [t.numel() * t.element_size() for t in tensors]


def held(engine, policy):
    """Bytes of everything that stays, by what it is called in DeepSpeed."""
    zero, trained = engine._zero, [p for p in policy.parameters() if p.requires_grad]
    found = {}
    if hasattr(zero, "bit16_groups_flat"):  # stages 1 and 2
        found["weights"] = nbytes(zero.bit16_groups_flat)
        found["master"] = nbytes(zero.single_partition_of_fp32_groups)
        found["own"] = sorted(p.numel() for group in zero.params_in_partition for p in group)
    elif hasattr(zero, "fp16_partitioned_groups_flat"):  # stage 3
        found["weights"] = nbytes(zero.fp16_partitioned_groups_flat)
        found["shards"] = nbytes(p.ds_tensor for p in policy.parameters())
        found["master"] = nbytes(zero.fp32_partitioned_groups_flat)
        found["gradients"] = nbytes([zero.grad_partitions_flat_buffer])
        buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        found["bucket"] = nbytes([buffer for buffer in buckets if buffer is not None])
    else:
        groups = getattr(zero, "fp32_groups", [trained])
        found["master"] = [sum(nbytes(group)) for group in groups]
    base = getattr(zero, "optimizer", zero)
    state = [s for s in base.state.values() if "exp_avg" in s]
    found["moments"] = [sum(nbytes([s["exp_avg"], s["exp_avg_sq"]])) for s in state]
    return found


told = []
for case in json.loads(Path(sys.argv[5]).read_text()):
    config = zero_config(folder, case, world)
    built = {}

    def keep(config, engine, dtype, channels, built=built):
        built["engine"], built["policy"] = engine, build_policy(config, engine, dtype, channels)
        return built["policy"]

    sys.modules["benchmarks.measured_memory"].build_policy = keep
    found = measure(
        config,
        case.get("samples", [case.get("length", 128)]),
        accumulation=case.get("accumulation", 1),
        process=process,
        updates=case.get("updates", 1),
        detailed=case.get("detailed", False),
    )
    told.append({"held": held(built["engine"], built["policy"]), **found})
print("TOLD " + json.dumps(told))
dist.barrier()
dist.stop()
