"""Prepared folders kept by the digest of their input, shared by runs through hard links."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from posttrain_dist.data.chat.rendering.served import SERVED, WITH_SERVED
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.data.prepared.summary import Summary
from posttrain_dist.errors import DataError, PosttrainError
from posttrain_dist.files import commit_folder, partial_of

KEPT_DAYS = 30  # that an entry stays after its last use
_ENTRY = re.compile(r"[0-9a-f]{32}")

Build = Callable[[Path], None]  # fills an empty folder
Log = Callable[[str], None]


class Unwritable(DataError):
    """A place for prepared data cannot be written to; the rows may be good."""


def cache_folder(named: str | None) -> Path:
    """Where prepared data is kept: `data.cache`, else posttrain/prepared in the user's cache."""
    if named is not None:
        return Path(named).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "posttrain" / "prepared"


def tokenizer_cache(named: str | None) -> Path:
    """Where tokenizers are kept; `named` is `data.cache`."""
    return cache_folder(named) / "tokenizers"


def get_or_build(cached: Path, build: Build, log: Log) -> Path:
    """The whole entry `cached`, made by `build` if it is not there; to be read only.

    One process builds, others that want the same wait for it. An entry that lacks a file, or has
    one that was cut, is built again.

    Raises:
        Unwritable: it is not there, and the cache cannot be written to.
        PosttrainError: what `build` raises, with nothing left behind.
    """
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        lock = cached.with_name(cached.name + ".lock").open("w", encoding="utf-8")
    except OSError as error:  # read-only: what is there can be used all the same
        if is_whole(cached):
            return cached
        raise _unwritable(cached, error) from error
    with lock:
        _take(lock.fileno(), log)
        if is_whole(cached):
            with contextlib.suppress(OSError):
                os.utime(cached)  # used now
        else:
            shutil.rmtree(cached, ignore_errors=True)
            _sweep(cached.parent)
            make_whole(cached, build)
    return cached


def fetch(cached: Path, folder: Path, build: Build, log: Log) -> None:
    """Put the cached entry at `folder`; where the cache cannot be used, build `folder` itself."""
    try:
        source = get_or_build(cached, build, log)
    except Unwritable as error:
        log(f"{cached.parent}: {error.what}; data.cache names another; preparing without one")
        make_whole(folder, build)
        return
    make_whole(folder, lambda partial: _link(source, partial))


def is_whole(folder: Path) -> bool:
    """Whether `folder` is a prepared one with all of its files in their sizes."""
    try:
        inputs = Summary.read(folder).inputs
        Examples.open(folder, "train")
        Examples.open(folder, "eval")
    except PosttrainError:
        return False
    names = ["findings.json", "heldout_records.jsonl"]
    if inputs.get("format", 0) >= WITH_SERVED:
        names.append(SERVED)
    return all((folder / name).is_file() for name in names)


def make_whole(folder: Path, build: Build) -> None:
    """Build beside `folder`, sync, and rename: a kill leaves nothing that looks complete.

    What `build` raises is passed on, with nothing left behind.

    Raises:
        Unwritable: the place cannot be written to.
    """
    partial = partial_of(folder)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        build(partial)
        commit_folder(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _unwritable(folder, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _unwritable(place: Path, error: OSError) -> Unwritable:
    return Unwritable(
        f"the prepared data cannot be written: {error.strerror}",
        where=str(place),
        fix="check permissions and free space there, or set data.cache to another folder",
    )


def _take(lock: int, log: Log) -> None:
    """Wait until no other process holds the lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log("waiting for another process that prepares the same data")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks


def _sweep(cache: Path) -> None:
    """Remove what killed processes left, and entries that nobody has used for long.

    A run that was started from an entry has its own links to the files. Only names that entries
    have are looked at: the folder may hold other things.
    """
    for lock in cache.glob("*.lock"):
        entry = lock.with_suffix("")
        if not _ENTRY.fullmatch(entry.name):
            continue
        with _free(lock) as free, contextlib.suppress(OSError):
            if not free:
                continue
            shutil.rmtree(entry.with_suffix(".partial"), ignore_errors=True)
            if time.time() - entry.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def _free(lock: Path) -> Iterator[bool]:
    """Hold a lock if nobody else does."""
    with contextlib.ExitStack() as held:
        try:
            stream = held.enter_context(lock.open("a", encoding="utf-8"))
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free


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
