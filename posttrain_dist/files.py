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


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} where there is no file."""
    values: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return values


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl; a torn last line, left by a kill, is passed over."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
