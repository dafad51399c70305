"""Processes on this machine that each drive a trial: `posttrain run <trial folder>`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from posttrain_launch.sweep.folder import Trial
from posttrain_launch.sweep.states import is_driven

RUN = (sys.executable, "-P", "-m", "posttrain_launch.cli", "run")


class Processes:
    """Trials that run, those of a driver of this sweep that was killed among them.

    Args:
        debug: have them show the stack trace of an error.
        program: drives the run of the folder behind it.
    """

    def __init__(self, *, debug: bool = False, program: Sequence[str] = RUN) -> None:
        self._debug, self._program = debug, program
        self._children: dict[int, subprocess.Popen[Any]] = {}
        self._folders: dict[int, Path] = {}
        self._others: set[int] = set()  # driven by processes that are not our children
        self._codes: dict[int, int | None] = {}

    def start(
        self,
        trial: Trial,
        arguments: Sequence[str] = (),
        *,
        output: IO[bytes] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Drive a trial, or watch the process that does.

        Args:
            arguments: more of `posttrain run`.
            output: takes what it prints; None: our own.
            environment: variables beside ours.
        """
        self._folders[trial.number] = trial.folder
        self._codes.pop(trial.number, None)
        if is_driven(trial.folder):
            self._others.add(trial.number)
            return
        command = [*self._program, str(trial.folder), *arguments]
        command += ["--debug"] if self._debug else []
        self._children[trial.number] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C reaches the sweep, which passes on what is meant
        )

    def running(self) -> set[int]:
        """Numbers of those that have not ended."""
        for number, child in list(self._children.items()):
            code = child.poll()
            if code is None:
                continue
            del self._children[number]
            if code != 0 and is_driven(self._folders[number]):
                self._others.add(number)  # which was first, so that ours was refused
            else:
                self._codes[number] = code
        for number in list(self._others):
            if not is_driven(self._folders[number]):
                self._others.remove(number)
                self._codes[number] = None
        return {*self._children, *self._others}

    def code(self, number: int) -> int | None:
        """The exit code of one that ended; None: it was no child of ours."""
        return self._codes.get(number)

    def stop(self) -> None:
        """Have all of them save and leave, and wait; a second Ctrl-C has them leave at once."""
        for number in self.running():
            self._signal(number, signal.SIGTERM)
        try:
            self._wait()
        except KeyboardInterrupt:
            for number in self.running():
                self._signal(number, signal.SIGINT)
                self._signal(number, signal.SIGINT)
            self._wait()

    def _wait(self) -> None:
        while self.running():
            time.sleep(0.1)

    def _signal(self, number: int, which: signal.Signals) -> None:
        child = self._children.get(number)
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(which)
        else:  # of a driver that was killed: a file requests what a signal would
            with contextlib.suppress(OSError):
                (self._folders[number] / "STOP").touch()
