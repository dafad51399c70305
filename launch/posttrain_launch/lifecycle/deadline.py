"""When the job of a driver ends, and the stop of its run in time before that.

POSTTRAIN_DEADLINE       seconds since 1970, or an ISO time with its offset
POSTTRAIN_DEADLINE_FILE  a file that holds one of these; read again, for a limit may be changed
SLURM_JOB_END_TIME       Slurm's own, since 23.02; seconds since 1970
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

from posttrain_dist.errors import ConfigError
from posttrain_launch.lifecycle.lead import within_limit
from posttrain_launch.lifecycle.measured import lead_of

POLL_S = 2.0


def job_end(environment: Mapping[str, str] = os.environ) -> float | None:
    """When the job of this process ends, in seconds since 1970; None: it does not say.

    Raises:
        ConfigError: POSTTRAIN_DEADLINE is no time.
    """
    if typed := environment.get("POSTTRAIN_DEADLINE"):
        end = _time_of(typed)
        if end is None:
            raise ConfigError(
                f"is {typed!r}, which is no time",
                where="the environment variable POSTTRAIN_DEADLINE",
                fix="give seconds since 1970 (date -d '+8 hours' +%s), or an ISO time with its "
                "offset, such as 2027-01-31T18:00:00+01:00",
            )
        return end
    if file := environment.get("POSTTRAIN_DEADLINE_FILE"):
        with contextlib.suppress(OSError):
            if end := _time_of(Path(file).read_text(encoding="utf-8").strip()):
                return end
    return _time_of(environment.get("SLURM_JOB_END_TIME", ""))


@contextlib.contextmanager
def stopped_before_end(run_folder: Path, stop: Callable[[str], None]) -> Iterator[None]:
    """Call `stop`, once and from a thread, when the end of the job is as near as a stop takes.

    Args:
        stop: called with a line for the terminal.

    Raises:
        ConfigError: POSTTRAIN_DEADLINE is no time.
    """
    if job_end() is None and "POSTTRAIN_DEADLINE_FILE" not in os.environ:
        yield
        return
    left = threading.Event()
    began = time.time()

    def watch() -> None:
        while not left.wait(POLL_S):
            end = job_end()
            if end is None:
                continue
            measured_s, source = lead_of(run_folder)
            lead_s = within_limit(measured_s, max(0.0, end - began))
            if (remaining_s := end - time.time()) <= lead_s:
                stop(
                    f"the time limit is {max(0.0, remaining_s):.0f} s away: saving and leaving "
                    f"({lead_s:.0f} s are kept for that: {source})"
                )
                return

    thread = threading.Thread(target=watch, name="deadline", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def _time_of(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(text).timestamp()
    return None
