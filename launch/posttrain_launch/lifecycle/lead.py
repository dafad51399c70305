"""How long before its time limit a run is stopped. Pure: the driver, `submit` and a simulation."""

from __future__ import annotations

FLOOR_S = 120.0  # while nothing is known of a run
TEARDOWN_S = 30.0  # until Ray and its processes are gone, logs are copied, and Slurm has noticed
# A save may meet another job's on the same storage.
SAVE_MARGIN = 1.5
# A stop is seen between two steps: the one that runs, and one that was begun as it was written.
STEPS = 2
MOST_OF_LIMIT = 0.5  # of a job's time; what takes longer to save needs a longer job


def stop_lead_s(
    save_s: float, step_s: float, *, pause_s: float = 0.0, teardown_s: float = TEARDOWN_S
) -> float:
    """Seconds before the end of a job at which its run is to be stopped.

    lead = 1.5 save + 2 step + pause + teardown

    Args:
        save_s: the longest of the newest saves.
        step_s: seconds of one update.
        pause_s: the longest of what else happens between two updates: an evaluation.
        teardown_s: from the end of the save to that of the job's last process.

    Raises:
        ValueError: a time is negative or not a number.
    """
    times = {"save_s": save_s, "step_s": step_s, "pause_s": pause_s, "teardown_s": teardown_s}
    for name, seconds in times.items():
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"{name} is {seconds}")
    return SAVE_MARGIN * save_s + STEPS * step_s + pause_s + teardown_s


def within_limit(lead_s: float, limit_s: float | None) -> float:
    """A lead that leaves at least half of a job's time to train; None: the job has no limit."""
    return lead_s if limit_s is None else min(lead_s, MOST_OF_LIMIT * limit_s)
