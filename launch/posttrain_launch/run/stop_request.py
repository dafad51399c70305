"""The file STOP of a run folder: the training sees it at its next step, saves and leaves.

Its text is why: a Cause of the life cycle, "cancel" of `posttrain cancel`, or nothing, where a
person made it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from posttrain_dist.attempts.train_apart import SIGNALS
from posttrain_launch.lifecycle.decide import Cause

FILE = "STOP"
# What a scheduler means by a signal; others are a person's.
_BY_SLURM = {
    signal.SIGUSR1: Cause.time_limit,
    signal.SIGUSR2: Cause.time_limit,
    signal.SIGTERM: Cause.preempted,
}


def request_stop(folder: Path, cause: Cause) -> None:
    """Ask the run of a folder to save and end; an earlier request keeps its cause.

    Raises:
        OSError: of a full disk, or a folder that was removed.
    """
    with (
        contextlib.suppress(FileExistsError),
        (folder / FILE).open("x", encoding="utf-8") as stream,
    ):
        stream.write(cause)


def requested_cause(folder: Path) -> Cause:
    """Why a run is to end."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return Cause.stopped
    return Cause(text) if text in (Cause.time_limit, Cause.preempted) else Cause.stopped


@contextlib.contextmanager
def stopped_by_signals(*folders: Path, log: Callable[[str], None]) -> Iterator[None]:
    """First signal: ask the runs of these folders to save and end. A second Ctrl-C: leave.

    In a job of Slurm USR1 and USR2 mean that its time limit is near, and TERM that it is preempted.
    A hang-up that was ignored when we started (`nohup`) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    causes = _BY_SLURM if "SLURM_JOB_ID" in os.environ else {}
    seen = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal seen
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not seen:
            seen = True
            once_more = "; Ctrl-C once more to leave now" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            try:
                for folder in folders:
                    request_stop(folder, causes.get(signal.Signals(number), Cause.stopped))
                log(f"{name}: saving and leaving{once_more}")
            except OSError as error:
                log(f"{name}: cannot ask the run to save: {error}{once_more}")

    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    held = [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, handle) for number in held}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
