"""The gate of a Ray run: its workers start while the driver prepares the data, and wait here.

Driver and workers share the run folder alone, so the gate is a file in it. It is there from the
beginning and only its content changes: a network file system may remember for half a minute that
a name was not there, but reads a file that is opened again as it is.
"""

from __future__ import annotations

import time
from pathlib import Path

from posttrain_dist.config import RunConfig
from posttrain_dist.data.read.tables import HF
from posttrain_dist.data.sources import file_sets
from posttrain_dist.errors import PosttrainError

# Rows of this size are prepared in about the time that workers take to start. For more, workers
# would hold their CPUs and GPUs idle, which others on the cluster may want.
SOON_BYTES = 16 << 20
OPEN, CLOSED = "the data is prepared\n", "the data is being prepared\n"
POLL_S = 0.05


def set_gate(run_folder: Path, text: str) -> None:
    """Let the workers of the run through (OPEN), or have those that come wait (CLOSED)."""
    file = _file(run_folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def wait_for_data(run_folder: Path) -> None:
    """Return as soon as the gate is open, or if the run has none.

    It has no time limit: the data of a run may take hours, and whoever waits is ended by the driver
    or with it.
    """
    file = _file(run_folder)
    while file.is_file() and file.read_text(encoding="utf-8") != OPEN:
        time.sleep(POLL_S)


def is_soon(config: RunConfig, run_folder: Path) -> bool:
    """Whether the data will be there before workers have started: it is small, or was prepared."""
    if (run_folder / "prepared" / "summary.json").is_file():
        return True
    try:
        sets = file_sets(config.data, config.objective.rows)
        if any(each.path.startswith(HF) for each in sets):
            return False
        return sum(file.stat().st_size for each in sets for file in each.files) <= SOON_BYTES
    except (PosttrainError, OSError):
        return False  # the driver is about to print what is wrong


def _file(run_folder: Path) -> Path:
    return run_folder / "logs" / "data.gate"
