"""Encode units of files in several processes, in order, with a bounded number under way.

Our own processes, not multiprocessing's: those run the user's main script again, which need not
be guarded against that, and forked ones inherit the threads of torch and tokenizers.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import IO

from posttrain_dist.data.chat.rendering.template_choice import TemplateSet
from posttrain_dist.prepare.chunk import Chunk
from posttrain_dist.prepare.processes import fork_server
from posttrain_dist.prepare.row_encoder import Job, RowEncoder, Task

CHUNKS_AHEAD = 4  # of one task that wait to be used
SMALL_BYTES = 4 << 20  # below, starting a process takes longer than the work


def encode(
    job: Job, tasks: Iterable[Task], processes: int, templates: TemplateSet | None = None
) -> Generator[Iterable[Chunk], None, None]:
    """The chunks of each task, in the order of the tasks; each is to be used up before the next.

    Args:
        templates: the loaded ones, for work that is done in this process.

    Raises:
        PosttrainError: as RowEncoder raised it.
    """
    if processes < 2:
        encoder = RowEncoder(job, templates)
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
    """A fork server, and one thread for each of its workers: it sends a task and waits for chunks.

    A worker is known by its two pipes: what it does is written to one, its answers come from the
    other, which ends when the worker does.
    """

    def __init__(self, job: Job, processes: int) -> None:
        pipes = [(*os.pipe(), *os.pipe()) for _ in range(processes)]
        theirs = [(tasks_read, answers_write) for tasks_read, _, _, answers_write in pipes]
        self._server = subprocess.Popen(
            fork_server.command(os.getpid(), theirs),
            stdin=subprocess.PIPE,
            env={**os.environ, **fork_server.ENVIRONMENT},
            pass_fds=[end for ends in theirs for end in ends],
        )
        for ends in theirs:
            for end in ends:
                os.close(end)
        self._closed = threading.Event()
        self._tasks: queue.SimpleQueue[tuple[Task, _Answer] | None] = queue.SimpleQueue()
        self._streams = [
            (os.fdopen(tasks, "wb"), os.fdopen(answers, "rb")) for _, tasks, answers, _ in pipes
        ]
        assert self._server.stdin is not None
        with contextlib.suppress(OSError), self._server.stdin as stdin:  # it died: seen later
            fork_server.send(stdin, job)
        self._threads = [
            threading.Thread(target=self._drive, args=streams, daemon=True)
            for streams in self._streams
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
        self._server.kill()  # and the system its workers
        for _ in self._threads:
            self._tasks.put(None)
        for (tasks, answers), thread in zip(self._streams, self._threads, strict=True):
            thread.join()
            while answers.read(1 << 20):  # until the worker has ended
                pass
            answers.close()
            with contextlib.suppress(OSError):  # what a dead process did not read
                tasks.close()
        self._server.wait()

    def _drive(self, tasks: IO[bytes], answers: IO[bytes]) -> None:
        while (entry := self._tasks.get()) is not None:
            task, answer = entry
            try:
                fork_server.send(tasks, task)
                while isinstance(item := pickle.load(answers), Chunk):
                    answer.put(item)
                answer.put(item)
            except (OSError, EOFError, pickle.UnpicklingError):
                answer.put(RuntimeError(f"a process that tokenises died ({self._code()})"))
            except Exception as error:  # whatever it is, the caller must not wait forever
                answer.put(error)

    def _code(self) -> str:
        """The exit code of the worker that died, which the server ends with."""
        try:
            code = self._server.wait(10)
        except subprocess.TimeoutExpired:
            return "its server goes on"
        return f"exit code {128 - code if code > 128 else code}"
