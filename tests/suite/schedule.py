"""What the suite needs of this machine, and which tests share a worker of pytest-xdist."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

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


def group_of(file: Path) -> tuple[int, str]:
    """(place in the order, name): tests of one name run one after the other in one process.

    What waits goes first and to one worker, so that others compute beside it and no two clusters
    run at once; then what starts processes. A file always stays whole: its fixtures are made once.
    """
    text = file.read_text(encoding="utf-8")
    if re.search(r"^(@|pytestmark = |\s+)pytest\.mark\.(ray|slurm)\b", text, re.MULTILINE):
        return 0, "clusters"
    starts_processes = re.search(r"\brun_workers\b|\bforkserver\b|\bsubprocess\b", text)
    return (1 if starts_processes else 2), str(file)


class Groups(LoadScopeScheduling):
    """Deals groups to the workers of pytest-xdist, the first in the order first.

    Not its own loadgroup: that writes a group's name into an attribute which pytest 9.2 does not
    have any more, and then deals single tests without a word.
    """

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)
        self._of_file: dict[str, str] = {}

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file not in self._of_file:
            self._of_file[file] = group_of(self.config.rootpath / file)[1]
        return self._of_file[file]
