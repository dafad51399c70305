"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


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
