"""One start of a run as its driver sees it: recorded when it begins, and how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain_dist.errors import ClusterError, ClusterLost
from posttrain_launch.failures import is_bad_config
from posttrain_launch.lifecycle import starts
from posttrain_launch.lifecycle.decide import Cause, Policy, highest_step, without_progress
from posttrain_launch.lifecycle.exit_codes import Exit

CODES = {
    Cause.finished: Exit.finished,
    Cause.bad_config: Exit.bad_config,
    Cause.stopped: Exit.stopped,
    Cause.time_limit: Exit.saved,
    Cause.preempted: Exit.saved,
    Cause.ray_lost: Exit.requeue,
}


@dataclass(slots=True)
class RecordedStart:
    """What is known of a start once it has ended."""

    cause: Cause = Cause.failed

    @property
    def code(self) -> int:
        """The exit code of its driver."""
        return code_of(self.cause)


def code_of(cause: Cause) -> int:
    """The exit code of a driver."""
    return int(CODES.get(cause, Exit.failed))


def cause_of(error: BaseException) -> Cause:
    """Why a driver ends that meets an error."""
    if isinstance(error, KeyboardInterrupt):
        return Cause.stopped
    if isinstance(error, ClusterLost):
        return Cause.ray_lost
    return Cause.bad_config if is_bad_config(error) else Cause.failed


@contextlib.contextmanager
def recorded_start(
    folder: Path, policy: Policy | None = None, *, runs: int = 1
) -> Iterator[RecordedStart]:
    """Write the lines of a start to logs/starts.jsonl; `cause` is to be set inside.

    Args:
        runs: that this process trains together.

    Raises:
        ClusterError: Slurm has started the same job again and again, and no start made progress.
    """
    job, policy = starts.this_job(), policy or Policy()
    number = starts.begin(folder, job, runs)
    start = RecordedStart()
    try:
        if job.restart_count:
            # Restarts of Slurm itself, after a lost node or a preemption, are decided here alone.
            _refuse_fruitless(folder, job.id, number, policy)
        yield start
    except BaseException as error:
        start.cause = cause_of(error)
        raise
    finally:
        starts.close(folder, number, start.code, start.cause, policy)


def _refuse_fruitless(folder: Path, job_id: str | None, number: int, policy: Policy) -> None:
    history = starts.history(folder, job_id, before=number)
    fruitless = without_progress(history)
    if fruitless >= policy.max_without_progress:
        raise ClusterError(
            f"was started {fruitless} times in a row without progress; its newest checkpoint is "
            f"that of step {highest_step(history)}",
            where=str(folder),
            fix="see logs/starts.jsonl for how each start ended; `posttrain submit` sends the run "
            "again",
        )
