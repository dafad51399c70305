"""Processes that need no start: forks of a server that has imported what the scripts import.

A fresh interpreter spends up to 9 s of CPU on torch, transformers and DeepSpeed before its first
line, and the suite runs dozens of them. A fork has memory and environment of its own, and nothing
behind it but imports. Tests of what a process imports, or of its memory, start a fresh one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

IMPORTED = [
    "posttrain_dist.train",
    "posttrain_dist.export",
    "posttrain_kernels",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # ZeRO reads it: it brings torch's compiler
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(IMPORTED)


class Fork:
    """A running script, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, script: Path, args: tuple[str, ...], output: Path, cwd: Path) -> None:
        self.process = context.Process(target=_run, args=(script, args, output, cwd))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def start(script: Path, *args: str, output: Path, cwd: Path | None = None) -> Fork:
    """Run `script` as `python script args` would; what it prints goes to the file `output`."""
    return Fork(script, args, output, cwd or Path.cwd())


def start_fresh(
    script: Path, *args: str, output: Path, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """The same, as an interpreter of its own."""
    with output.open("wb") as file:
        command = [sys.executable, str(script), *args]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=cwd)


def _run(script: Path, args: tuple[str, ...], output: Path, cwd: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.chdir(cwd)
    sys.argv = [str(script), *args]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
