"""What the suite needs of this machine, and which tests share a worker of pytest-xdist."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

# Debian's package -> (a program of it, what is skipped without it)
PACKAGES = {
    "slurm-wlm": ("slurmctld", "tests/slurm (marked slurm)"),
    "munge": ("munged", "tests/slurm (marked slurm)"),
    "iproute2": ("ip", "tests/slurm (marked slurm)"),
    "chromium": ("chromium", "pages in a browser (marked browser)"),
    "shellcheck": ("shellcheck", "the check of slurm/*.sh"),
}


def find_program(name: str) -> str | None:
    """Its path; daemons are in folders that only root has on its PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def report(find: Callable[[str], str | None] = find_program, user: int | None = None) -> list[str]:
    """The first lines of a run: what will be skipped on this machine, and how to get it."""
    missing = [name for name, (program, _) in PACKAGES.items() if find(program) is None]
    skipped = dict.fromkeys(PACKAGES[name][1] for name in missing)
    lines = [f"missing Debian packages: {', '.join(missing)}"] if missing else []
    lines += [f"  skipped for it: {what}" for what in skipped]
    if missing:
        sudo = "" if user == 0 else "sudo "
        lines.append(f"  to run them: {sudo}apt-get install {' '.join(missing)}")
    if user != 0:
        lines.append("not root: tests/slurm is skipped, it makes namespaces (run as root)")
    return lines


def group_of(file: Path, marks: Collection[str], fixtures: Collection[str]) -> tuple[int, str]:
    """(place in the order, name): tests of one name run one after the other in one process.

    What waits goes first and to one worker, so that the other computes beside it, and no two
    clusters run at once; ranks share the server that they are forked from. Else a file stays whole.
    """
    if {"ray", "slurm"} & set(marks):
        return 0, "clusters"
    if "run_workers" in fixtures:
        return 1, "ranks"
    starts_processes = file.parent.name in ("launch", "prepare", "tests", "run", "batch")
    return (2 if starts_processes else 3), str(file)
