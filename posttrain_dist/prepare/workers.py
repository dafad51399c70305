"""Encode units of files in several processes, in order, with a bounded number under way.

Our own processes, not multiprocessing's: those run the user's main script again, which need not
be guarded against that, and forked ones inherit the threads of torch and tokenizers.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import IO

from posttrain_dist.data.chat.template import ChatTemplate
from posttrain_dist.errors import PosttrainError
from posttrain_dist.prepare.chunk import Chunk
from posttrain_dist.prepare.row_encoder import Job, RowEncoder, Task

CHUNKS_AHEAD = 4  # of one task that wait to be used
_PR_SET_PDEATHSIG = 1
SMALL_BYTES = 4 << 20  # below, starting a process takes longer than the work


def encode(
    job: Job, tasks: Iterable[Task], processes: int, template: ChatTemplate | None = None
) -> Generator[Iterable[Chunk], None, None]:
    """The chunks of each task, in the order of the tasks; each is to be used up before the next.

    Args:
        template: the loaded template, for work that is done in this process.

    Raises:
        PosttrainError: as RowEncoder raised it.
    """
    if processes < 2:
        encoder = RowEncoder(job, template)
        for task in tasks:
            yield encoder.chunks(task)
        return
    pool = _Pool(job, processes)
    try:
        pending: deque[_Answer] = deque()
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > 2 * processes:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        pool.close()


class _Answer:
    """The chunks of one task as they come in; who sends them waits while many are not used."""

    def __init__(self, closed: threading.Event) -> None:
        self._closed = closed
        self._queue: queue.Queue[Chunk | Exception | None] = queue.Queue(maxsize=CHUNKS_AHEAD)

    def put(self, item: Chunk | Exception | None) -> None:
        """One chunk; an error or None ends them."""
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return

    def __iter__(self) -> Iterator[Chunk]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item


class _Pool:
    """One thread for each process: it sends a task and waits for its chunks."""

    def __init__(self, job: Job, processes: int) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        start = f"from posttrain_dist.prepare.workers import work; work({os.getpid()})"
        self._closed = threading.Event()
        self._tasks: queue.SimpleQueue[tuple[Task, _Answer] | None] = queue.SimpleQueue()
        self._children = [
            subprocess.Popen(
                [sys.executable, "-c", start],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for _ in range(processes)
        ]
        self._threads = [
            threading.Thread(target=self._drive, args=(child, job), daemon=True)
            for child in self._children
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task) -> _Answer:
        answer = _Answer(self._closed)
        self._tasks.put((task, answer))
        return answer

    def close(self) -> None:
        """End the processes, also in the middle of a task."""
        self._closed.set()
        for child in self._children:
            child.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for child, thread in zip(self._children, self._threads, strict=True):
            thread.join()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what a dead process did not read
                        stream.close()

    def _drive(self, child: subprocess.Popen[bytes], job: Job) -> None:
        assert child.stdin is not None and child.stdout is not None
        first = True
        while (entry := self._tasks.get()) is not None:
            task, answer = entry
            try:
                if first:
                    _send(child.stdin, job)
                    first = False
                _send(child.stdin, task)
                while isinstance(item := pickle.load(child.stdout), Chunk):
                    answer.put(item)
                answer.put(item)
            except (OSError, EOFError, pickle.UnpicklingError):
                child.kill()
                code = child.wait()
                answer.put(RuntimeError(f"a process that tokenises died (exit code {code})"))
            except Exception as error:  # whatever it is, the caller must not wait forever
                answer.put(error)


def _send(stream: IO[bytes], value: object) -> None:
    pickle.dump(value, stream, protocol=5)
    stream.flush()


def work(parent: int) -> None:
    """What each process does: a Job, then Tasks from stdin; Chunks and None for each to stdout."""
    _end_with(parent)
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    try:
        encoder = RowEncoder(pickle.load(stdin))
        gc.freeze()  # what the libraries hold need not be looked through again and again
        while True:
            task = pickle.load(stdin)
            end: Exception | None = None
            try:
                for chunk in encoder.chunks(task):
                    _send(stdout, chunk)
            except PosttrainError as error:
                end = error
            except Exception as error:  # it may be of a class that cannot be sent
                end = RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            _send(stdout, end)
    except (EOFError, BrokenPipeError):
        return


def _end_with(parent: int) -> None:
    """Die with the process that started this one, whatever ends it (Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
