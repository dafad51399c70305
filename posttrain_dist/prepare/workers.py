"""Encode chunks in several processes, in order, with a bounded number under way.

Our own processes, not multiprocessing's: those run the user's main script again, which need not
be guarded against that, and forked ones inherit the threads of torch and tokenizers.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import IO

from posttrain_dist.prepare.rows import Job, Part, RowEncoder, Task

SMALL_BYTES = 4 << 20  # below, starting a process takes longer than the work


def encode(job: Job, tasks: Iterable[Task], processes: int) -> Iterator[Part]:
    """The part of each task, in the order of the tasks.

    Raises:
        PosttrainError: as RowEncoder raised it.
    """
    if processes < 2:
        encoder = RowEncoder(job)
        for task in tasks:
            yield encoder.part(task)
        return
    pool = _Pool(job, processes)
    try:
        waiting: deque[Future[Part]] = deque()
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.close()


class _Pool:
    """One thread for each process: it sends a task and waits for its part."""

    def __init__(self, job: Job, processes: int) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "posttrain_dist.prepare.workers"]
        self._tasks: queue.SimpleQueue[tuple[Task, Future[Part]] | None] = queue.SimpleQueue()
        self._children = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            for _ in range(processes)
        ]
        self._threads = [
            threading.Thread(target=self._drive, args=(child, job), daemon=True)
            for child in self._children
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task) -> Future[Part]:
        future: Future[Part] = Future()
        self._tasks.put((task, future))
        return future

    def close(self) -> None:
        """End the processes, also in the middle of a task."""
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
            task, future = entry
            try:
                if first:
                    _send(child.stdin, job)
                    first = False
                _send(child.stdin, task)
                answer = pickle.load(child.stdout)
            except (OSError, EOFError, pickle.UnpicklingError):
                child.kill()
                what = f"a process that tokenises died (exit code {child.wait()})"
                future.set_exception(RuntimeError(what))
                continue
            if isinstance(answer, Part):
                future.set_result(answer)
            else:
                future.set_exception(answer)


def _send(stream: IO[bytes], value: object) -> None:
    pickle.dump(value, stream, protocol=5)
    stream.flush()


def _main() -> None:
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    try:
        encoder = RowEncoder(pickle.load(stdin))
        while True:
            task = pickle.load(stdin)
            try:
                answer: object = encoder.part(task)
            except Exception as error:
                answer = error
            _send(stdout, answer)
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    # Under its real name: pickles name the module that a class was defined in.
    from posttrain_dist.prepare.workers import _main as main

    main()
