"""A pass over prepared samples that is killed in its third part: folder part_tokens kill."""

import os
import signal
import sys
from pathlib import Path

from stored_passes import fill, negative_ids, opened

folder, part_tokens, kill = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "kill"
calls = 0


def score(batch):
    global calls
    calls += 1
    if kill and calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return negative_ids(batch)


stored, examples = opened(folder)
fill(stored, examples, score, part_tokens)
print("CALLS", calls)
