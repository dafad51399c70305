"""What follows when a start of a run has ended. Pure: the same for Slurm, Ray and a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from posttrain_launch.lifecycle.exit_codes import Exit


class Cause(StrEnum):
    """Why the processes of a start ended."""

    finished = "finished"  # FINISHED is there
    bad_config = "bad_config"
    failed = "failed"  # an error that starting again does not cure
    stopped = "stopped"  # by a person: Ctrl-C, `posttrain cancel`, scancel
    time_limit = "time_limit"
    preempted = "preempted"  # Slurm itself queues the job again
    requeued = "requeued"  # Slurm has queued it again: scontrol requeue, or a node that went down
    node_failure = "node_failure"
    ray_lost = "ray_lost"  # Ray's head, or a node that it could not replace
    killed = "killed"  # the driver ended without a word


class Action(StrEnum):
    """What whoever started the run does next."""

    end = "end"
    requeue = "requeue"  # start it again, once
    wait = "wait"  # do nothing: Slurm starts it again by itself, unless the script leaves first


@dataclass(frozen=True, slots=True)
class Start:
    """How one start of a run went.

    Attributes:
        before: step of the newest whole checkpoint when it began; 0: there was none.
        after: the same when it ended.
        code: exit code of the driver.
    """

    before: int
    after: int
    code: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class Policy:
    """What a run is allowed.

    Attributes:
        max_without_progress: starts in a row after which no checkpoint is newer than before them.
        requeue: whether it may be started again without a person.
    """

    max_without_progress: int = 3
    requeue: bool = True


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens now, and why, as one sentence.

    Attributes:
        code: exit code of the job.
    """

    action: Action
    reason: str
    code: int


# Causes that end a run, whatever came before.
_ENDS = {
    Cause.finished: (Exit.finished, "finished"),
    Cause.bad_config: (Exit.bad_config, "the configuration is wrong"),
    Cause.failed: (Exit.failed, "it failed in a way that starting again does not cure"),
    Cause.stopped: (Exit.stopped, "a person stopped it"),
}
_STARTS_AGAIN = {
    Cause.time_limit: (Exit.saved, "the time limit was near"),
    Cause.preempted: (Exit.saved, "it was preempted"),
    Cause.requeued: (Exit.saved, "Slurm has queued it again"),
    Cause.node_failure: (Exit.requeue, "a node failed"),
    Cause.ray_lost: (Exit.requeue, "Ray lost a machine that the run needs"),
    Cause.killed: (Exit.requeue, "its driver was killed"),
}
_BY_SLURM = (Cause.preempted, Cause.requeued)


def next_action(history: Sequence[Start], policy: Policy | None = None) -> Decision:
    """What is to be done after the newest start of a run.

    Args:
        history: the starts of one job, oldest first; one that a person submits has a new history.

    Raises:
        ValueError: the history is empty.
    """
    if not history:
        raise ValueError("nothing was started")
    policy = policy or Policy()
    cause = history[-1].cause
    if cause in _ENDS:
        code, reason = _ENDS[cause]
        return Decision(Action.end, reason, int(code))
    code, reason = _STARTS_AGAIN[cause]
    fruitless = without_progress(history)
    if fruitless >= policy.max_without_progress:
        stands = f"its newest checkpoint is still that of step {highest_step(history)}"
        if not highest_step(history):
            stands = "it has no checkpoint yet"
        end = f"{reason}; {_starts(fruitless)} without progress, {stands}"
        return Decision(Action.end, end, int(Exit.failed))
    if cause in _BY_SLURM:
        return Decision(Action.wait, reason, int(code))
    if not policy.requeue:
        return Decision(Action.end, f"{reason}, and it is not to be queued again", int(code))
    return Decision(Action.requeue, reason, int(code))


def without_progress(history: Sequence[Start]) -> int:
    """Newest starts in a row after which no checkpoint was newer than any before them.

    A checkpoint that is reached again, after a newer one was found damaged, is no progress: a run
    could lose and reach it for ever.
    """
    count = 0
    highest = history[0].before if history else 0
    for start in history:
        count = 0 if start.after > highest else count + 1
        highest = max(highest, start.before, start.after)
    return count


def highest_step(history: Sequence[Start]) -> int:
    """Step of the newest checkpoint that any of the starts saw."""
    return max((max(start.before, start.after) for start in history), default=0)


def _starts(count: int) -> str:
    return "a start" if count == 1 else f"{count} starts in a row"
