"""Preparing data from a command: a line that says how far it is, and the report at its end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from posttrain_dist.config import RunConfig
from posttrain_dist.files import write_atomic

QUIET_S = 10.0  # between two lines where the output is no terminal


@contextmanager
def told(err: IO[str]) -> Iterator[dict[str, Any]]:
    """`progress` and `say` for `prepare`: a bar on a terminal, few lines elsewhere."""
    if not err.isatty():
        yield {"progress": _Lines(err), "say": lambda line: print(line, file=err, flush=True)}
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=err), transient=True) as bar:
        task = bar.add_task("preparing data", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield {"progress": show, "say": lambda line: bar.console.print(line, markup=False)}


def formats_line(report: dict[str, Any]) -> str:
    """In which format the rows were read, source by source."""
    found = {file["source"]: file["format"] for file in report["files"]}
    names = set(found.values())
    said = names.pop() if len(names) == 1 else ", ".join(f"{s}: {n}" for s, n in found.items())
    how = ", recognised from the first rows" if report["settings"]["format"] == "auto" else ""
    return f"format of the rows: {said}{how}"


class _Lines:
    """A line every few seconds."""

    def __init__(self, err: IO[str]) -> None:
        self._err, self._since = err, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._since > QUIET_S:
            self._since = time.monotonic()
            print(f"preparing data: {done} of {total} parts", file=self._err, flush=True)


def write_data_report(
    config: RunConfig, prepared: Path, folder: Path
) -> tuple[dict[str, Any], Path]:
    """Write data_report.json and data_report.html into `folder`; the report, and its page."""
    from posttrain_dist.inspection import inspect
    from posttrain_dist.report.data_page import data_page

    report = inspect(config, prepared)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "data_report.html"
    write_atomic(folder / "data_report.json", json.dumps(report, ensure_ascii=False, indent=1))
    write_atomic(page, data_page(report))
    return report, page
