"""The process that loads the tokenizer and the chat template once, and forks those that encode.

It holds tokenizers, jinja and numpy, no torch and no transformers, and has one thread: forks of a
process with several may wait for ever for a lock that no thread of theirs holds. So it is started
by us, not forked from the user's process, whose threads nobody knows.

    parent --Job--> server --fork--> worker: Tasks in; for each its Chunks, then None or an error
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import IO

from posttrain_dist.errors import PosttrainError
from posttrain_dist.prepare.row_encoder import RowEncoder

_PR_SET_PDEATHSIG = 1
# One thread for numpy and tokenizers, so that there is none to lose in a fork.
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}

Pipes = tuple[int, int]  # file descriptors of a worker: Tasks, answers


def command(parent: int, pipes: Sequence[Pipes]) -> list[str]:
    """The command that starts the server, which reads a Job from stdin."""
    script = f"from {__name__} import serve; serve({parent}, {list(pipes)})"
    return [sys.executable, "-P", "-c", script]


def serve(parent: int, pipes: Sequence[Pipes]) -> None:
    """Load what the Job names, fork a worker for each pair of pipes, wait for their ends.

    It ends with the first worker that dies, with its code, and all others end with it.
    """
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends us
    os.dup2(2, 1)  # what a library prints
    encoder = _load(sys.stdin.buffer)
    server = os.getpid()
    for own in pipes:
        if os.fork() == 0:
            _end_with(server)
            for each in pipes:
                if each != own:
                    os.close(each[0])
                    os.close(each[1])
            try:
                work(encoder, *own)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    for each in pipes:
        os.close(each[0])
        os.close(each[1])
    for _ in pipes:
        _, status = os.wait()
        if code := os.waitstatus_to_exitcode(status):
            os._exit(code if code > 0 else 128 - code)


def _load(stdin: IO[bytes]) -> RowEncoder | PosttrainError:
    """The encoder, ready to encode; or why there is none, which is the answer to each Task."""
    try:
        encoder = RowEncoder(pickle.load(stdin))
        encoder.load()
    except PosttrainError as error:
        return error
    gc.collect()
    gc.freeze()  # what the libraries hold is not looked through again, nor copied by the workers
    return encoder


def work(encoder: RowEncoder | PosttrainError, tasks_fd: int, answers_fd: int) -> None:
    """What each worker does: Tasks in; Chunks for each, then None or an error, out."""
    with (
        contextlib.suppress(EOFError, BrokenPipeError),
        os.fdopen(tasks_fd, "rb") as tasks,
        os.fdopen(answers_fd, "wb") as answers,
    ):
        while True:
            task = pickle.load(tasks)
            end: Exception | None = None
            try:
                if isinstance(encoder, PosttrainError):
                    raise encoder
                for chunk in encoder.chunks(task):
                    send(answers, chunk)
            except PosttrainError as error:
                end = error
            except BrokenPipeError:
                raise
            except Exception as error:  # it may be of a class that cannot be sent
                end = RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            send(answers, end)


def send(stream: IO[bytes], value: object) -> None:
    """Write a value for `pickle.load` of the other side."""
    pickle.dump(value, stream, protocol=5)
    stream.flush()


def _end_with(parent: int) -> None:
    """Die with the process that started this one, whatever ends it (Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
