"""Where the numbers of a run go: metrics.jsonl and samples.log, which every run writes.

A disk that refuses a line while the run trains does not stop it: lines are kept and written as soon
as that can be done, and a file that was removed is written again (`posttrain_dist.files.LineFile`).
Only lines that are refused to the end are an error, after the last checkpoint was saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from posttrain_dist.errors import reason, unwritable
from posttrain_dist.files import LineFile, read_rows, saved_bytes
from posttrain_dist.flow import StepInfo
from posttrain_dist.logs import notify


class Sink(Protocol):
    """Takes every step once, on rank 0."""

    def write(self, info: StepInfo) -> None:
        """Take in one step."""

    def close(self) -> None:
        """Flush; nothing is written after.

        Raises:
            PosttrainError: the disk refuses what was written.
        """


class JsonlSink:
    """`metrics.jsonl`: one object per logged step. A resumed run drops the rows after its step.

    Raises:
        PosttrainError: the file cannot be written.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        kept = [row for row in read_rows(path) if row["step"] <= start_step] if start_step else []
        self._file = open_lines(path, map(json.dumps, kept))

    def write(self, info: StepInfo) -> None:
        if info.metrics:  # not every step is logged
            self._file.append(json.dumps(info.row()))

    def close(self) -> None:
        close_lines(self._file)


class SampleLog:
    """`samples.log`: which samples were in which step, one line per step.

    Raises:
        PosttrainError: the file cannot be written.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        lines = saved_bytes(path).decode("utf-8", "replace").splitlines() if start_step else []
        kept = [line for line in lines if line.split("\t")[0].isdigit()]
        kept = [line for line in kept if int(line.split("\t")[0]) <= start_step]
        self._file = open_lines(path, kept)

    def write(self, info: StepInfo) -> None:
        if info.sample_ids:
            self._file.append(f"{info.step}\t{' '.join(map(str, info.sample_ids))}")

    def close(self) -> None:
        close_lines(self._file)


def open_lines(path: Path, lines: Iterable[str]) -> LineFile:
    """A growing file of the run folder `path.parent`, which says when lines begin to be refused."""

    def report(error: OSError) -> None:
        refused = f"{path.name} cannot be written: {reason(error)}"
        notify(path.parent, f"{refused}; training goes on, its lines are kept in memory until then")

    try:
        return LineFile(path, lines, report)
    except OSError as error:
        raise unwritable(path, error) from error


def close_lines(file: LineFile) -> None:
    """Close a growing file.

    Raises:
        PosttrainError: there are lines that the disk refuses.
    """
    try:
        file.close()
    except OSError as error:
        raise unwritable(file.path, error) from error
