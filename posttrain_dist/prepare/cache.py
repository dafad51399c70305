"""Prepared folders kept by the digest of their input, shared by runs through hard links."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from posttrain_dist.errors import DataError
from posttrain_dist.files import sync


def cache_folder(named: str | None) -> Path:
    """Where prepared data is kept: `data.cache`, else posttrain/prepared in the user's cache."""
    if named is not None:
        return Path(named).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "posttrain" / "prepared"


def fetch(cached: Path, folder: Path, build: Callable[[Path], None]) -> bool:
    """Put the cached folder at `folder`, made by `build` if it is not there yet.

    One process builds, others that want the same wait for it. Where the cache cannot be written,
    `build` makes `folder` itself.

    Returns:
        Whether it was in the cache already.
    """
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        lock = cached.with_name(cached.name + ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # read-only, or a file system without locks
        make_whole(folder, build)
        return False
    with lock:
        found = cached.is_dir()
        if not found:
            make_whole(cached, build)
        make_whole(folder, lambda partial: _link(cached, partial))
    return found


def make_whole(folder: Path, build: Callable[[Path], None]) -> None:
    """Build beside `folder`, sync, and rename: a kill leaves nothing that looks complete.

    What `build` raises is passed on, with nothing left behind.

    Raises:
        DataError: the place cannot be written to.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        build(partial)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        if folder.exists():
            folder.rmdir()  # an empty one
        partial.rename(folder)
        sync(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(
            f"the prepared data cannot be written: {error.strerror}",
            where=str(folder),
            fix="check permissions and free space there",
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _link(cached: Path, partial: Path) -> None:
    """The same files under other names: no copy where both are on one file system."""
    for path in sorted(cached.rglob("*")):
        target = partial / path.relative_to(cached)
        if path.is_dir():
            target.mkdir()
            continue
        try:
            target.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, target)
