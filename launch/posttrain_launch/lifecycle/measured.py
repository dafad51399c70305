"""The lead of a run folder, from what the run has measured, else from its plan."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from posttrain_dist.checkpoint.save_times import save_times
from posttrain_dist.files import read_object
from posttrain_launch.lifecycle.lead import FLOOR_S, stop_lead_s

TAIL_BYTES = 1 << 16  # of metrics.jsonl
NEWEST = 50  # rows of it


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of the newest steps.

    Attributes:
        step_s: of one update.
        pause_s: the longest of what happens between two, saves apart: an evaluation.
    """

    step_s: float
    pause_s: float


def lead_of(run_folder: Path) -> tuple[float, str]:
    """Seconds before the end of its job at which a run is stopped, and what they follow from.

    Measured saves and steps come first; until there are some, the rehearsed save and the step of
    the plan, then the plan alone, then a constant.
    """
    saves, steps = save_times(run_folder), measured_steps(run_folder)
    speed = _planned(run_folder)
    if saves and (steps is not None or speed is not None):
        times = steps or StepTimes(float(speed["step_s"]), 0.0) if speed else steps
        assert times is not None
        lead_s = stop_lead_s(max(saves), times.step_s, pause_s=times.pause_s)
        return lead_s, "measured" if steps else "the rehearsed save and the planned step"
    if speed is not None:
        planned_s = stop_lead_s(float(speed["checkpoint_s"]), float(speed["step_s"]))
        return max(FLOOR_S, planned_s), "planned"
    return FLOOR_S, "nothing is measured yet"


def measured_steps(run_folder: Path) -> StepTimes | None:
    """Times of a run's newest steps, from the end of metrics.jsonl; None: fewer than two rows."""
    rows = _newest_rows(run_folder / "metrics.jsonl")
    windows = [
        ((later["time_s"] - earlier["time_s"]) / (later["step"] - earlier["step"]), earlier, later)
        for earlier, later in pairwise(rows)
        if later["step"] > earlier["step"] and later["time_s"] > earlier["time_s"]
    ]
    if not windows:
        return None
    step_s = statistics.median(each for each, _, _ in windows)
    longest = max(
        later["time_s"] - earlier["time_s"] - step_s * (later["step"] - earlier["step"])
        for _, earlier, later in windows
    )
    saves = save_times(run_folder)
    return StepTimes(step_s, max(0.0, longest - max(saves, default=0.0)))


def _newest_rows(path: Path) -> list[dict[str, Any]]:
    """Whole rows with a step and its time, at the end of a file that may be large."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = stream.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "time_s" in row and "step" in row:
            rows.append(row)
    return rows[-NEWEST:]


def _planned(run_folder: Path) -> dict[str, Any] | None:
    """`speed` of plan.json; None: the run was not planned."""
    try:
        speed = read_object(run_folder / "plan.json")["plan"]["speed"]
        return speed if speed["step_s"] >= 0 and speed["checkpoint_s"] >= 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
