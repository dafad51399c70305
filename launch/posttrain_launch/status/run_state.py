"""Folder and queue as one state. FINISHED beats all; a job that lives beats what starts left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from posttrain_dist.errors import PosttrainError
from posttrain_launch.batch.queue import ON_NODES, PAUSED, WAITING, QueuedJob, read_queue
from posttrain_launch.run.driver_lock import Driver, find_driver
from posttrain_launch.status.find_runs import Found
from posttrain_launch.status.log_parts import last_exception
from posttrain_launch.status.ray_jobs import is_elsewhere, read_ray
from posttrain_launch.status.run_facts import RunFacts, StartRecord, read_facts


class RunState(StrEnum):
    """Where a run stands."""

    finished = "finished"
    pruned = "pruned"  # by the search of a sweep
    running = "running"
    starting = "starting"  # its processes are there, and no step of this start is logged yet
    stopping = "stopping"  # it is to save and leave
    pending = "pending"
    requeued = "requeued"  # waits for its next start
    suspended = "suspended"
    saved = "saved"  # stopped with a checkpoint; it can go on
    failed = "failed"
    cancelled = "cancelled"  # its job was ended by a person, without a word of the run
    ended = "ended"  # nothing drives it, and it left no reason
    new = "new"  # never started
    unknown = "unknown"

    @property
    def is_live(self) -> bool:
        """Whether something drives the run, or will."""
        return self in _LIVE


_LIVE = frozenset(
    {
        RunState.running,
        RunState.starting,
        RunState.stopping,
        RunState.pending,
        RunState.requeued,
        RunState.suspended,
    }
)
# Final states of Slurm in which the job was ended from outside, and what that means for a run.
_CUT_OFF = {
    "TIMEOUT": "its time limit came before it had saved",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "its memory (cluster.memory_per_node) was not enough",
    "BOOT_FAIL": "a node did not start",
    "DEADLINE": "its deadline came",
    "PREEMPTED": "it was preempted and not queued again",
}
_BY_THE_RUN = ("failed", "bad_config")  # causes of an end that the driver has an exception of


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What the table has of one run."""

    run: str
    state: RunState
    folder: Path | None
    job: str | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    run_left_s: float | None = None
    job_left_s: float | None = None
    restarts: int = 0
    reason: str = ""
    nodes: str = ""


@dataclass(frozen=True, slots=True)
class Survey:
    """Runs, and what could not be found out about them."""

    runs: Sequence[RunStatus]
    notes: Sequence[str] = ()


def survey(found: Sequence[Found]) -> Survey:
    """Where these runs stand, with one question to each queue.

    A queue that does not answer leaves what the run folders say, and a note.
    """
    silent = []
    jobs: dict[str, QueuedJob] = {}
    open_jobs = [run.job for run in found if run.job is not None and not _is_finished(run)]
    try:
        jobs |= read_queue([job.id for job in open_jobs if job.system == "slurm"])
    except PosttrainError as error:
        silent.append(f"{error.what} ({error.where})")
    of_ray, of_clusters = read_ray([job for job in open_jobs if job.system == "ray"])
    jobs |= of_ray
    silent += of_clusters
    notes = [f"{why}; states are those of the run folders" for why in silent]
    return Survey([status_of(run, jobs) for run in found], notes)


def _is_finished(run: Found) -> bool:
    return run.folder is not None and (run.folder / "FINISHED").is_file()


def status_of(
    run: Found,
    jobs: Mapping[str, QueuedJob],
    find: Callable[[Path], Driver | None] = find_driver,
) -> RunStatus:
    """Where one run stands.

    Args:
        jobs: what the queues know, by id.
        find: who drives a run folder.
    """
    job = jobs.get(run.job.id) if run.job is not None else None
    name, job_id = run.name, run.job.id if run.job is not None else None
    if run.folder is None:
        return RunStatus(run=name, state=RunState.unknown, folder=None, job=job_id)
    try:
        facts = read_facts(run.folder)
    except (PosttrainError, OSError) as error:
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}".splitlines()[0]
        state = RunState.unknown
        return RunStatus(run=name, state=state, folder=run.folder, job=job_id, reason=reason)
    is_queued = job is not None and job.is_live
    driver = None if is_queued or facts.finished else find(run.folder)
    state, reason = state_of(facts, job, driver)
    return RunStatus(
        run=name,
        state=state,
        folder=run.folder,
        job=job_id,
        step=facts.step,
        total_steps=facts.total_steps,
        loss=facts.loss,
        tokens_per_s=facts.tokens_per_s if state.is_live or facts.finished else None,
        run_left_s=facts.left_s if state.is_live else None,
        job_left_s=job.time_left_s if job is not None and is_queued else None,
        restarts=max(len(facts.starts) - 1, job.restarts if job else 0, 0),
        reason=reason,
        nodes=job.nodes if job is not None and is_queued else "",
    )


def state_of(facts: RunFacts, job: QueuedJob | None, driver: Driver | None) -> tuple[RunState, str]:
    """The state of a run and its reason.

    Args:
        job: as its queue has it; None: it has no job, or its queue does not know it.
        driver: the process that holds the run folder.
    """
    if is_elsewhere(facts.folder) and job is not None and job.state == "COMPLETED":
        return RunState.finished, "its run folder is on the cluster"
    if facts.finished:
        return RunState.finished, "ended early by its diagnosis" if facts.early_stop else ""
    if job is not None and job.state in WAITING:
        again = facts.begun or job.restarts > 0
        return RunState.requeued if again else RunState.pending, _waits(job, facts.starts)
    if job is not None and job.state in PAUSED:
        return RunState.suspended, job.reason
    if driver is not None or (job is not None and job.state in ON_NODES):
        return _of_running(facts, job, driver)
    if facts.pruned:
        return RunState.pruned, ""
    return _of_ended(facts, job)


def _waits(job: QueuedJob, starts: Sequence[StartRecord]) -> str:
    before = f"after: {starts[-1].reason}" if starts and starts[-1].reason else ""
    return "; ".join(filter(None, (job.reason, before)))


def _of_running(
    facts: RunFacts, job: QueuedJob | None, driver: Driver | None
) -> tuple[RunState, str]:
    where = "" if driver is None or driver.pid is None else f"process {driver.pid} on {driver.host}"
    reason = "" if job is not None and job.is_live else where
    if facts.stop_requested:
        return RunState.stopping, reason or "saves at its next step"
    began = facts.starts[-1].began if facts.starts else None
    if is_elsewhere(facts.folder):
        return RunState.running, "its run folder is on the cluster"
    if facts.logged is None or (began is not None and facts.logged < began):
        return RunState.starting, reason
    return RunState.running, reason


def _of_ended(facts: RunFacts, job: QueuedJob | None) -> tuple[RunState, str]:
    last = facts.starts[-1] if facts.starts else None
    final = job.state if job is not None else ""
    said = last.reason if last is not None else ""
    if facts.outcome == "stopped":
        return RunState.saved, said or "stopped; `posttrain run` or `submit` goes on"
    if facts.error:
        return RunState.failed, _error_line(facts.error)
    if last is not None and last.ended:
        if last.cause == "stopped":
            return RunState.cancelled, said or last.cause
        raised = last_exception(facts.folder) if last.cause in _BY_THE_RUN else ""
        return RunState.failed, raised or said or last.cause
    if facts.cancelled or final == "CANCELLED":
        return (
            RunState.cancelled,
            "by `posttrain cancel`" if facts.cancelled else "its job was cancelled",
        )
    if final in _CUT_OFF:
        return RunState.failed, _CUT_OFF[final]
    if final:  # COMPLETED, or FAILED without a word of the run
        why = job.reason if job is not None and job.reason else f"its job ended ({final})"
        return RunState.failed, f"{why} and the run is not finished"
    if not facts.begun and facts.job is None:
        return RunState.new, ""
    return RunState.ended, "nothing drives it: it was killed, or failed as its log says"


def _error_line(error: Mapping[str, object]) -> str:
    problems = error.get("problems")
    if isinstance(problems, list) and problems and isinstance(problems[0], dict):
        return f"{_error_line(problems[0])}; {len(problems)} problems in all"
    what = str(error.get("what") or "no message").splitlines()[0]
    where = str(error.get("where") or "")
    rank = error.get("rank")
    text = f"{where}: {what}" if where else what
    return text if rank is None else f"rank {rank}: {text}"
