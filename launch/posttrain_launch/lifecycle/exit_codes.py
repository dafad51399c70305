"""The exit codes of `posttrain`, in one place: what each means, and what follows from it."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit code of a verb, of a run's driver, and of its Slurm job."""

    finished = 0  # of a run: its folder holds FINISHED
    failed = 1  # something that starting again does not cure
    bad_config = 2  # wrong input; nothing was begun
    requeue = 75  # the machines failed, not the run: start it again (EX_TEMPFAIL of sysexits.h)
    saved = 85  # saved and left because the time limit or a preemption was near: start it again
    stopped = 130  # saved and left because a person stopped it; `posttrain run` goes on

    @property
    def starts_again(self) -> bool:
        """Whether the run is to be started again by whoever started it."""
        return self in (Exit.requeue, Exit.saved)
