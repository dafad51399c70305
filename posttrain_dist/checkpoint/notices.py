"""What a run that goes on tells: in the log of each rank, on the terminal, and in run.json."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path

from posttrain_dist import dist
from posttrain_dist.files import read_object, write_atomic
from posttrain_dist.logs import notify

_log = logging.getLogger(__name__)


class Notices:
    """The lines of one start of a run; every rank calls alike, rank 0 writes."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self._texts: list[str] = []

    def add(self, text: str) -> None:
        """Tell one line."""
        self._texts.append(text)
        if dist.rank() == 0:
            notify(self._folder, text)
        else:
            _log.warning("%s", text)

    def record(self, checkpoint: Path, step: int) -> None:
        """Keep what was told with the run: an entry of `continued` in run.json."""
        if not self._texts or dist.rank() != 0:
            return
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        entry = {"time": now, "step": step, "from": str(checkpoint), "notices": self._texts}
        values = read_object(self._folder / "run.json")
        values["continued"] = [*values.get("continued", []), entry]
        write_atomic(self._folder / "run.json", json.dumps(values, indent=1) + "\n")
