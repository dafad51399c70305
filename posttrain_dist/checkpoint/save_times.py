"""logs/saves.json of a run folder: seconds that its newest saves took, the rehearsed one too.

From it follows how long before a time limit a run has to stop. It is no part of metrics.jsonl,
which a run that goes on cuts back to its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from posttrain_dist import dist
from posttrain_dist.files import write_atomic

FILE = Path("logs", "saves.json")
KEPT = 8


@contextlib.contextmanager
def timed_save(run_folder: Path) -> Iterator[None]:
    """Measure the save that is made inside; rank 0 writes what it took, if it succeeded."""
    began = time.monotonic()
    yield
    if dist.rank() != 0:
        return
    seconds = [*save_times(run_folder), round(time.monotonic() - began, 3)][-KEPT:]
    with contextlib.suppress(OSError):  # a full disk does not end a run by this file
        write_atomic(run_folder / FILE, json.dumps({"save_s": seconds}) + "\n")


def save_times(run_folder: Path) -> list[float]:
    """Seconds of the newest saves, oldest first; empty: none was measured."""
    try:
        found = json.loads((run_folder / FILE).read_text(encoding="utf-8"))["save_s"]
        return [float(seconds) for seconds in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []
