"""Logs as they grow, across restarts of their run, as `tail -F` shows them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

POLL_S = 0.5
MOST_BYTES = 1_000_000  # of one look; what is beyond comes with the next


class GrowingLog:
    """Reads the whole lines that are added to a file, each once.

    A file that is not there yet is waited for; one that was replaced or cut is read from its start.
    """

    def __init__(self, path: Path, *, at_end: bool = True) -> None:
        self.path = path
        self._offset, self._node = 0, 0
        if at_end and path.is_file():
            about = path.stat()
            self._offset, self._node = about.st_size, about.st_ino

    def read(self, *, final: bool = False) -> list[str]:
        """The lines since the last call.

        Args:
            final: also one that has no end yet.
        """
        try:
            with self.path.open("rb") as stream:
                about = os.fstat(stream.fileno())
                if about.st_ino != self._node or about.st_size < self._offset:
                    self._offset, self._node = 0, about.st_ino
                stream.seek(self._offset)
                data = stream.read(MOST_BYTES)
        except OSError:
            self._offset, self._node = 0, 0  # the next one may get the number of this one
            return []
        whole = data if final or len(data) == MOST_BYTES else data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        text = whole.decode("utf-8", "replace")
        return [line.rpartition("\r")[2] for line in text.rstrip("\n").split("\n")] if text else []


def follow(
    paths: Callable[[], Sequence[Path]],
    show: Callable[[Path, list[str]], None],
    is_live: Callable[[], bool],
    poll_s: float = POLL_S,
) -> None:
    """Show what is added to logs until nothing drives the run any more.

    Args:
        paths: the logs to follow; asked again and again, for a restart may bring new ones.
        show: called with a log and its new lines.
        is_live: whether more may come; what came until then is still shown.
    """
    logs = {path: GrowingLog(path) for path in paths()}
    while True:
        live = is_live()
        for path in paths():
            if path not in logs:
                logs[path] = GrowingLog(path, at_end=False)
        for path, log in logs.items():
            if lines := log.read(final=not live):
                show(path, lines)
        if not live:
            return
        time.sleep(poll_s)
