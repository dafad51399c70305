"""Where the numbers of a run go: metrics.jsonl always, W&B as a mirror of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from posttrain_dist.files import read_rows, write_atomic
from posttrain_dist.flow import StepInfo


class Sink(Protocol):
    """Takes every step once, on rank 0."""

    def write(self, info: StepInfo) -> None:
        """Take in one step."""

    def close(self) -> None:
        """Flush; nothing is written after."""


class JsonlSink:
    """`metrics.jsonl`: one object per logged step. A resumed run drops the rows after its step."""

    def __init__(self, path: Path, start_step: int) -> None:
        kept = [row for row in read_rows(path) if row["step"] <= start_step] if start_step else []
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")

    def write(self, info: StepInfo) -> None:
        if info.metrics:  # not every step is logged
            self._file.write(json.dumps(info.row()) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class SampleLog:
    """`samples.log`: which samples were in which step, one line per step."""

    def __init__(self, path: Path, start_step: int) -> None:
        lines = path.read_text().splitlines() if start_step and path.is_file() else []
        kept = [line for line in lines if line.split("\t")[0].isdigit()]
        kept = [line for line in kept if int(line.split("\t")[0]) <= start_step]
        write_atomic(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, info: StepInfo) -> None:
        if info.sample_ids:
            self._file.write(f"{info.step}\t{' '.join(map(str, info.sample_ids))}\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()
