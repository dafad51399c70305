"""One attempt of a run in a process of its own.

However a library holds on to memory, a process that has ended holds none. And one that the kernel
ended for its memory ends nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import (
    ClusterError,
    OutOfMemory,
    PosttrainError,
    error_fields,
    error_of,
)
from posttrain_dist.files import read_object, write_atomic
from posttrain_dist.rehearsal.out_of_memory import advice, describe

GRACE_S = 5.0  # from being asked to end to being killed
END = b"\0"  # of the config, on stdin
# What the caller hears too, and turns into the file STOP.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def train_apart(config: RunConfig, folder: Path) -> None:
    """Train the run of a folder, with one worker, in a process of its own; wait for its end.

    It lives in a session of its own, so that Ctrl-C reaches the caller alone, which asks it to stop
    by the file STOP; signals that are sent to all processes of a job do not end it either.

    Args:
        config: of this start, which config.yaml of the folder need not be.

    Raises:
        PosttrainError: as it was raised there; OutOfMemory where the kernel ended the process.
        ClusterError: something else ended it.
    """
    error, log = folder / "logs" / "error.json", folder / "logs" / "rank-0.log"
    error.unlink(missing_ok=True)
    kills = kernel_kills()
    command = [sys.executable, "-P", "-m", "posttrain_dist.attempts.train_apart", str(folder)]
    with log.open("ab") as out:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # the config; its end then shows the child that we died
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _hand_over(config, child)
        while (code := child.poll()) is None:
            # Short waits, so that a signal handler's exception is seen at once.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.2)
    finally:
        _end(child)
    if error.exists():
        raise error_of(read_object(error))
    if code == -signal.SIGKILL and kernel_kills() > kills:
        raise killed(config, folder)
    if code != 0:
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        raise ClusterError(
            f"the training ended {ended}",
            where=str(log),
            fix="its last lines say what happened; if it was killed for memory (dmesg), "
            + advice(config, folder),
        )


def killed(config: RunConfig, folder: Path, *, rank: int = 0) -> OutOfMemory:
    """The error of a worker that was killed because the memory of its host was gone."""
    what = "out of memory of the host: the process was killed for it"
    return describe(what, config, folder, where=f"rank {rank}", host=True)


def kernel_kills() -> int:
    """Processes that the kernel has killed for memory since this machine started."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _hand_over(config: RunConfig, child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already, and says why
        child.stdin.write(config.to_yaml().encode() + END)
        child.stdin.flush()


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child that still runs: by the end of its stdin, then by force."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=GRACE_S)
    if child.poll() is None:
        child.kill()
        child.wait()


def main(folder: Path) -> int:
    """Train as the process that `train_apart` started; the exit code."""
    for number in SIGNALS:
        signal.signal(number, _leave_it_to_the_caller)
    text = _read_config()
    threading.Thread(target=_end_with_caller, daemon=True).start()
    from posttrain_dist.train import train

    try:
        train(RunConfig.from_yaml(text), folder)
    except Exception as error:
        traceback.print_exc()
        fields = error_fields(_for_user(error, folder), 0, traceback.format_exc())
        write_atomic(folder / "logs" / "error.json", json.dumps(fields, indent=1))
        return 1
    return 0


def _for_user(error: Exception, folder: Path) -> PosttrainError:
    if isinstance(error, PosttrainError):
        return error
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    log = folder / "logs" / "rank-0.log"
    return ClusterError(f"{type(error).__name__}: {first_line}", where=str(log), fix="read it")


def _leave_it_to_the_caller(number: int, frame: FrameType | None) -> None:
    """What a process that this one starts does not inherit, as it would that none is heard."""


def _read_config() -> str:
    read = bytearray()
    while not read.endswith(END):
        if not (part := os.read(0, 1 << 16)):
            os._exit(1)  # the caller has died
        read += part
    return read[: -len(END)].decode()


def _end_with_caller() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
