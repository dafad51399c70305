"""Temporary folders with a marker of who made them, so that the next run removes abandoned ones.

A process that is killed removes nothing. Each folder holds its owner's pid and start time: a later
run removes those whose owner has ended, and touches no folder without our marker.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PREFIX = "posttrain-"
MARKER = ".posttrain-owner.json"


def make_temporary(
    kind: str, root: Path | None = None, keep: Mapping[str, Path] | None = None
) -> Path:
    """A new folder `posttrain-<kind>-…`, private to the user, owned by this process.

    Args:
        root: where; None: the system's folder for temporary files (TMPDIR).
        keep: folder in it -> where that is copied to before all is removed.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-", dir=root))
    mark(folder, keep=keep)
    return folder


def mark(folder: Path, pid: int | None = None, keep: Mapping[str, Path] | None = None) -> None:
    """Write who owns a folder, this process unless `pid` is given; over an earlier marker."""
    owner = _owner(os.getpid() if pid is None else pid)
    owner["keep"] = {name: str(place) for name, place in (keep or {}).items()}
    (folder / MARKER).write_text(json.dumps(owner), encoding="utf-8")


def remove_temporary(folder: Path) -> None:
    """Remove a marked folder, after what its marker says is to be kept was copied; never raises."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        for name, place in owner["keep"].items():
            _copy(folder / name, Path(place))
    shutil.rmtree(folder, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder over another, for its owner alone, where the target's run is still there."""
    if not (source.is_dir() and target.parent.parent.is_dir()):
        return
    shutil.rmtree(target, ignore_errors=True)
    with contextlib.suppress(shutil.Error, OSError):  # a log that vanishes is no failure
        shutil.copytree(source, target, ignore_dangling_symlinks=True)
    for path in (target, *target.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)


def remove_abandoned(root: Path | None = None) -> list[Path]:
    """Remove this user's marked folders below `root` whose owner has ended; never raises.

    A folder of another host or of another container, whose processes cannot be seen from here, is
    left alone.
    """
    removed = []
    for folder in Path(root or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            owner = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            if _has_ended(owner):
                remove_temporary(folder)
                removed.append(folder)
    return removed


def _owner(pid: int) -> dict[str, Any]:
    """What tells a process from every other one, also from a later one with its pid."""
    return {"pid": pid, "start": _start_time(pid), **_place()}


def _place() -> dict[str, str]:
    """Where pids mean what they mean here: a host, since it booted, a container of it."""
    place = {"host": socket.gethostname(), "boot": "", "namespace": ""}
    with contextlib.suppress(OSError):
        place["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place["namespace"] = str(Path("/proc/self/ns/pid").readlink())
    return place


def _has_ended(owner: dict[str, Any]) -> bool:
    here = _place()
    if owner["host"] != here["host"]:
        return False
    if owner["boot"] != here["boot"]:
        return True
    if owner["namespace"] != here["namespace"]:
        return False
    return not _is_running(owner["pid"], owner["start"])


def _is_running(pid: int, start: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _start_time(pid) == start


def _start_time(pid: int) -> str:
    """In ticks since the boot; "" where the system does not say, or for a process that ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # after the name, which may hold spaces
    return "" if fields[0] == "Z" else fields[19]
