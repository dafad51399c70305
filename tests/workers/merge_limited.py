"""One process that may allocate little: merges a folder that is far larger, and says what it took.

merge_limited.py 0 1 PORT FOLDER OUT SHARD_BYTES LIMIT_BYTES
"""

import resource
import sys
from pathlib import Path

import torch

from posttrain_dist.checkpoint.hf_folder import RunFacts, write_hf_folder
from posttrain_dist.tuning.adapters.merged_tensors import merged_tensors
from posttrain_dist.tuning.base import Tuning

folder, out = Path(sys.argv[4]), Path(sys.argv[5])
shard_bytes, limit_bytes = int(sys.argv[6]), int(sys.argv[7])


class AddOne(Tuning):
    """Adds to every matrix."""

    def merge(self, name, weight, kept, network=None):
        return (weight.float() + kept["delta"]).to(weight.dtype)


torch.set_num_threads(1)
torch.randn(64, 64) @ torch.randn(64, 64)  # what torch allocates once
status = Path("/proc/self/status").read_text()
allocated_kb = int(status.partition("VmData:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, ((allocated_kb << 10) + limit_bytes,) * 2)
tensors = merged_tensors(folder, AddOne(), {"delta": torch.ones(())}, dtype=torch.bfloat16)
facts = RunFacts(served=None)
write_hf_folder(tensors, folder, out, dtype=torch.bfloat16, facts=facts, shard_bytes=shard_bytes)
print("merged")
try:  # the limit holds: what is written would not fit
    whole = [torch.zeros(limit_bytes, dtype=torch.uint8) for _ in range(2)]
    print("no limit")
except RuntimeError:
    print("limited")
