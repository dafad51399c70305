"""Ending a run so that it saves first, and is not started again.

A file STOP with the text "cancel" is the request: the training saves and leaves at its next step,
wherever it runs, and what decides about another start reads the text. What does not end within a
grace is ended by its queue, and goes on from its last checkpoint if it is submitted again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain_dist.errors import ClusterError, PosttrainError
from posttrain_launch.batch.queue import ON_NODES, QueuedJob, cancel_job, read_queue
from posttrain_launch.ray import remote
from posttrain_launch.run.driver_lock import Driver, find_driver
from posttrain_launch.run.job_record import JobRecord
from posttrain_launch.run.stop_request import FILE as STOP
from posttrain_launch.status.find_runs import Found
from posttrain_launch.status.ray_jobs import is_elsewhere, read_ray_job
from posttrain_launch.status.run_facts import CANCEL
from posttrain_launch.status.run_state import RunState, status_of

POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Way:
    """How runs are to be stopped.

    Attributes:
        now: without waiting for a save.
        grace_s: how long one may take to save and end.
        log: called with a line about what happens.
    """

    now: bool
    grace_s: float
    log: Callable[[str], None]


def stop_order(runs: Sequence[Found]) -> list[Found]:
    """Runs in the order in which they are to be stopped; those on nodes are asked at once.

    Those that wait come first: they would start where others end. The others then save side by
    side, while one after the other is waited for.
    """
    records = [run.job for run in runs if run.job is not None and run.job.system == "slurm"]
    jobs = read_queue([record.id for record in records]) if len(runs) > 1 else {}
    on_nodes = {job.id for job in jobs.values() if job.state in ON_NODES}
    running = [run for run in runs if run.job is not None and run.job.id in on_nodes]
    for run in running:
        if run.folder is not None:
            with contextlib.suppress(PosttrainError):  # raised again by `stop_run`
                _request(run.folder)
    return [run for run in runs if run not in running] + running


def stop_run(run: Found, way: Way) -> bool:
    """Stop one run, and wait for its end.

    Returns:
        Whether there was anything to stop.

    Raises:
        ClusterError: its queue refuses or does not answer.
        PosttrainError: the run belongs to another user, or does not end.
    """
    job = None if run.job is None else _queued(run.job)
    driver = find_driver(run.folder) if run.folder is not None else None
    if run.job is not None and job is not None and job.is_live:
        _stop_job(run, run.job, job, way)
    elif driver is not None and run.folder is not None:
        _stop_driver(run, run.folder, driver, way)
    else:
        state = status_of(run, {} if job is None else {job.id: job}).state
        way.log(f"{run.name}: nothing to stop, it is {state}")
        return False
    return True


def _queued(record: JobRecord) -> QueuedJob | None:
    """A job as its queue has it now; None: the queue does not know it."""
    if record.system == "ray":
        return read_ray_job(record)
    return read_queue([record.id]).get(record.id)


def _end(record: JobRecord) -> None:
    """Have its queue end a job."""
    if record.system == "ray":
        remote.stop(record)
    else:
        cancel_job(record.id)


def _stop_job(run: Found, record: JobRecord, job: QueuedJob, way: Way) -> None:
    folder = run.folder if run.folder is None or not is_elsewhere(run.folder) else None
    on_nodes = job.state in ON_NODES
    if folder is not None:
        # With --now, too: what a job does at its end must not bring it back. And of a task of an
        # array that was cancelled while it waited, Slurm keeps no record.
        _request(folder)
    if folder is None or way.now or not on_nodes:
        _end(record)
        if on_nodes:
            _wait(lambda: not _is_live(record), way.grace_s)
        way.log(f"{run.name}: job {job.id} cancelled; it was {job.state.lower()}")
        return
    way.log(f"{run.name}: job {job.id} saves and ends (at most {way.grace_s:g} s)")

    def ended() -> bool:
        now = _queued(record)
        if now is None or not now.is_live:
            return True
        if now.state not in ON_NODES:  # queued again meanwhile
            _end(record)
            return True
        if now.state != "COMPLETING":
            _request(folder)  # again: a driver that only now begins removes an old one
        return False

    if not _wait(ended, way.grace_s):
        way.log(f"{run.name}: still there after {way.grace_s:g} s: its job is ended")
        _end(record)
        _wait(lambda: not _is_live(record), way.grace_s)
    _log_end(run, way)


def _is_live(record: JobRecord) -> bool:
    job = _queued(record)
    return job is not None and job.is_live


def _stop_driver(run: Found, folder: Path, driver: Driver, way: Way) -> None:
    if way.now and not driver.is_here:
        raise ClusterError(
            f"is driven by a process of {driver.host or 'another machine'}, not of this one",
            where=run.name,
            fix="give --now there; without --now it saves and ends from here, too",
        )
    if way.now:
        # Twice, as Ctrl-C: the second ends the workers at once. Before the training one is enough.
        _signal(driver, signal.SIGINT, run)
        time.sleep(POLL_S)
        if find_driver(folder) is not None:
            _signal(driver, signal.SIGINT, run)
        way.log(f"{run.name}: process {driver.pid} ends at once")
    elif driver.is_here:
        _request(folder)
        _signal(driver, signal.SIGTERM, run)
        way.log(f"{run.name}: process {driver.pid} saves and ends (at most {way.grace_s:g} s)")
    else:
        _request(folder)
        way.log(f"{run.name}: saves and ends on {driver.host} (at most {way.grace_s:g} s)")
    if not _wait(lambda: find_driver(folder) is None, way.grace_s):
        raise PosttrainError(
            f"has not ended within {way.grace_s:g} s",
            where=run.name,
            fix=f"its log is {folder / 'logs' / 'driver.log'}; --now ends it without a save",
        )
    _log_end(run, way)


def _signal(driver: Driver, number: signal.Signals, run: Found) -> None:
    assert driver.pid is not None
    try:
        os.kill(driver.pid, number)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise _not_ours(run) from error


def _request(folder: Path) -> None:
    try:
        (folder / STOP).write_text(f"{CANCEL}\n", encoding="utf-8")
    except PermissionError as error:
        raise _not_ours(Found(folder, str(folder), None)) from error


def _not_ours(run: Found) -> PosttrainError:
    owner = ""
    if run.folder is not None:
        try:
            owner = f" ({run.folder.owner()})"
        except (KeyError, OSError):
            owner = ""
    return PosttrainError(
        "may not be stopped by you: it belongs to another user",
        where=run.name,
        fix=f"ask its owner{owner}, or an operator of the cluster",
    )


def _log_end(run: Found, way: Way) -> None:
    status = status_of(Found(run.folder, run.name, None), {})
    step = "" if status.step is None else f" at step {status.step}"
    how = status.state.value
    if status.state is RunState.saved:
        how = f"saved{step}; `posttrain run {run.folder}` goes on"
    way.log(f"{run.name}: {how}")


def _wait(done: Callable[[], bool], most_s: float) -> bool:
    end = time.monotonic() + most_s
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True
