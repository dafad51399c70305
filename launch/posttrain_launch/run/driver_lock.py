"""The process that drives a run, known by the lock that it holds in the run folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from dataclasses import dataclass
from pathlib import Path

LOCK = Path("logs", "driver.lock")  # of a run folder; "pid host" of the process that holds it


@dataclass(frozen=True, slots=True)
class Driver:
    """Who drives a run."""

    pid: int | None  # None: a process of another machine, or one that is not known
    host: str | None

    @property
    def is_here(self) -> bool:
        """Whether it can be signalled from here."""
        return self.pid is not None and self.host == platform.node()


def find_driver(folder: Path) -> Driver | None:
    """The driver of a run that is alive; None: nobody drives it.

    On this machine the lock is never touched, so that a driver that starts just now gets it; a
    lock of another machine is tried for a moment, shared.
    """
    path = folder / LOCK
    try:
        pid_text, _, host = path.read_text(encoding="utf-8").strip().partition(" ")
    except OSError:
        return None
    pid = int(pid_text) if pid_text.isdigit() else None
    if pid is not None and host == platform.node() and Path("/proc/self/fd").is_dir():
        return Driver(pid, host) if _has_open(pid, path) else None
    return Driver(pid, host or None) if _is_locked(path) else None


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open; of another user's, whether it lives."""
    try:
        handles = list(Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        return True
    except OSError:
        return False
    for handle in handles:
        with contextlib.suppress(OSError):
            if handle.samefile(path):
                return True
    return False


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False
