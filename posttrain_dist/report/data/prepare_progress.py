"""How far the preparation of data is, on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

QUIET_S = 10.0  # between two lines where the output is no terminal


@contextmanager
def progress_output(err: IO[str]) -> Iterator[dict[str, Any]]:
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


class _Lines:
    """A line every few seconds."""

    def __init__(self, err: IO[str]) -> None:
        self._err, self._since = err, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._since > QUIET_S:
            self._since = time.monotonic()
            print(f"preparing data: {done} of {total} parts", file=self._err, flush=True)
