"""The folder of a run's own Ray, below the system's temporary one: private, marked, removed.

posttrain-xxxxxxxx/     0700, so that nobody else comes to what Ray makes in it (it opens its own
  owner.json            folders to everyone); which process it belongs to
  r/                    Ray's: session_.../sockets, logs
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

PREFIX, MARKER, INSIDE = "posttrain-", "owner.json", "r"
# A Unix socket's path has at most 107 bytes, and Ray makes
# `<temp>/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store` of it.
LONGEST = 40
KIND = "the Ray of a posttrain run"


def make(run_folder: Path) -> Path:
    """A new folder, short enough for sockets; those of dead owners are removed first."""
    roots = [Path(tempfile.gettempdir()), Path("/tmp")]
    short = [root for root in roots if len(f"{root}/{PREFIX}12345678/{INSIDE}") <= LONGEST]
    root = (short or roots)[0]
    remove_abandoned(root)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))  # 0700
    marker = {"kind": KIND, "run": str(run_folder), **identity(os.getpid())}
    (folder / MARKER).write_text(json.dumps(marker), encoding="utf-8")
    return folder


def ray_folder(folder: Path) -> Path:
    """What Ray is given."""
    return folder / INSIDE


def remove(folder: Path, run_folder: Path) -> None:
    """Remove it; the logs of Ray's newest session go to the run folder, readable by its owner."""
    logs = ray_folder(folder) / "session_latest" / "logs"
    target = run_folder / "ray" / "logs"
    if logs.is_dir() and run_folder.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(shutil.Error, OSError):  # a log that vanishes is no failure
            shutil.copytree(logs, target, ignore_dangling_symlinks=True)
        for path in (target, *target.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(root: Path) -> None:
    """Remove folders that a killed run of this user left in `root`, never those of another."""
    for folder in root.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            owner = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            if owner["kind"] == KIND and _is_dead(owner):
                remove(folder, Path(owner["run"]))


def identity(pid: int) -> dict[str, Any]:
    """What tells a process from another that gets its number later, or has it elsewhere (Linux)."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return {
        "pid": pid,
        "start": int(stat.rpartition(")")[2].split()[19]),  # clock ticks since boot
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip(),
        "pids": str(Path("/proc/self/ns/pid").readlink()),  # a container counts its own
    }


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether a process is known to be dead; one of another machine or container is not."""
    here = identity(os.getpid())
    if (owner["boot"], owner["pids"]) != (here["boot"], here["pids"]):
        return False
    try:
        return bool(identity(owner["pid"])["start"] != owner["start"])
    except FileNotFoundError:
        return True
