"""What a run folder says of itself: how far it is, how it ended, how often it started.

Only ends of growing files are read: `metrics.jsonl` of a long run has hundreds of MB.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from posttrain_launch.lifecycle.starts import FILE as STARTS
from posttrain_launch.run.job_record import JobRecord, read_job
from posttrain_launch.sweep.folder import PRUNED

TAIL_BYTES = 1 << 16
PACE_ROWS = 20  # logged steps that the speed is taken over


@dataclass(frozen=True, slots=True)
class StartRecord:
    """One start of the run, as its driver recorded it."""

    number: int
    job: str | None = None
    began: float | None = None  # seconds since the epoch
    ended: bool = False
    cause: str = ""
    action: str = ""  # end, requeue, wait
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """A run folder as read; what is missing or torn is None or empty."""

    folder: Path
    job: JobRecord | None = None
    finished: bool = False
    early_stop: bool = False
    pruned: bool = False
    step: int | None = None  # the last that was logged
    total_steps: int | None = None
    loss: float | None = None  # of training, last logged
    tokens_per_s: float | None = None
    step_s: float | None = None  # over the last logged steps
    logged: float | None = None  # time of the last logged step, seconds since the epoch
    outcome: str = ""  # of logs/outcome.json: completed or stopped
    error: dict[str, Any] = field(default_factory=dict)  # logs/error.json of the newest start
    stop_requested: bool = False
    starts: tuple[StartRecord, ...] = ()

    @property
    def begun(self) -> bool:
        """Whether any start of it got as far as to say something."""
        return bool(self.starts) or self.step is not None or bool(self.error or self.outcome)

    @property
    def left_s(self) -> float | None:
        """Seconds to the last step, at the speed of the last logged ones."""
        if self.step is None or self.total_steps is None or self.step_s is None:
            return None
        return max(0, self.total_steps - self.step) * self.step_s


def read_facts(folder: Path) -> RunFacts:
    """Read a run folder.

    Raises:
        PosttrainError: its job.json holds no job.
        PermissionError: the folder may not be read.
    """
    os.scandir(folder).close()  # else all files of a folder that is closed to us seem missing
    metrics = folder / "metrics.jsonl"
    rows = [row for row in tail_rows(metrics) if isinstance(row.get("step"), int)]
    trained = [row for row in rows if isinstance(row.get("train/loss"), int | float)]
    last = trained[-1] if trained else {}
    starts = read_starts(folder)
    outcome, finished = read_json(folder / "logs" / "outcome.json"), folder / "FINISHED"
    total = outcome.get("total_steps", read_json(folder / "logs" / "plan.json").get("total_steps"))
    return RunFacts(
        folder=folder,
        job=read_job(folder),
        finished=finished.is_file(),
        early_stop=read_json(finished).get("reason") == "early_stop",
        pruned=(folder / PRUNED).exists(),
        step=rows[-1]["step"] if rows else None,
        total_steps=total if isinstance(total, int) else None,
        loss=last.get("train/loss"),
        tokens_per_s=last.get("train/tokens_per_s"),
        step_s=_step_s(rows[-PACE_ROWS:]),
        logged=_modified(metrics) if rows else None,
        outcome=str(outcome.get("outcome", "")),
        error=_newest_error(folder, starts),
        stop_requested=(folder / "STOP").exists(),
        starts=starts,
    )


def read_starts(folder: Path) -> tuple[StartRecord, ...]:
    """The starts of a run in their order; their end, where it was written, joined to them."""
    found: dict[int, dict[str, Any]] = {}
    for row in tail_rows(folder / STARTS):
        if isinstance(row.get("start"), int):
            found.setdefault(row["start"], {}).update(row)
    return tuple(
        StartRecord(
            number,
            None if row.get("job") is None else str(row["job"]),
            _time(row.get("began")),
            "ended" in row,
            str(row.get("cause") or ""),
            str(row.get("action") or ""),
            str(row.get("reason") or ""),
        )
        for number, row in sorted(found.items())
    )


def tail_rows(path: Path, most_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The JSON objects of the last whole lines of a file; [] where there is none."""
    rows = []
    for line in tail_text(path, most_bytes).split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def tail_text(path: Path, most_bytes: int = TAIL_BYTES) -> str:
    """The last bytes of a file as text, from the beginning of a line on; "" where there is none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            start = max(0, size - most_bytes)
            stream.seek(start)
            data = stream.read()
    except OSError:
        return ""
    if start:
        data = data[data.find(b"\n") + 1 :]
    return data.decode("utf-8", "replace")


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} where there is none or another thing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _step_s(rows: Iterable[dict[str, Any]]) -> float | None:
    """Seconds a step over rows of one start: its clock goes on from an earlier one's."""
    points = [(row["step"], row["time_s"]) for row in rows if "time_s" in row]
    if len(points) < 2:
        return None
    (first, began), (last, now) = points[0], points[-1]
    return (now - began) / (last - first) if last > first and now > began else None


def _newest_error(folder: Path, starts: tuple[StartRecord, ...]) -> dict[str, Any]:
    path = folder / "logs" / "error.json"
    written, began = _modified(path), starts[-1].began if starts else None
    if written is None or (began is not None and written < began - 1):
        return {}  # of an earlier start
    return read_json(path)


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _time(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None
