"""Files that are written whole or not at all, and the rows of those that grow line by line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str, *, to_disk: bool = False) -> None:
    """Write `text` aside and rename it into place: a reader sees the old file or the new one.

    Args:
        to_disk: wait until the content is on the disk, so that it outlives a power cut.
    """
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    if to_disk:
        sync(aside)
    aside.replace(path)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl; a torn last line, left by a kill, is passed over."""
    return _parse(path.read_bytes()) if path.is_file() else []


class RowFollower:
    """Reads the rows that are appended to a growing file, such as metrics.jsonl, each once."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def skip(self) -> None:
        """Pass over what stands in the file now."""
        self._offset = self._path.stat().st_size if self._path.is_file() else 0

    def read(self) -> list[dict[str, Any]]:
        """The rows since the last call; one that is still being written comes with the next."""
        if not self._path.is_file():
            return []
        # A resumed run cuts the rows that it will write again.
        self._offset = min(self._offset, self._path.stat().st_size)
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return _parse(whole)


def _parse(data: bytes) -> list[dict[str, Any]]:
    """The lines that are whole: JSON objects with a step."""
    rows = []
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
