"""The line that says how far a run is: it follows metrics.jsonl and logs/plan.json."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from posttrain_dist.files import RowFollower
from posttrain_dist.logs import NOTICES
from posttrain_dist.report.numbers import clock, loss_of_log, rounded
from posttrain_dist.report.run.compared import accuracy_text

POLL_S = 0.3
QUIET_S = 5.0  # least time between two plain lines, the first and the last aside


class Progress:
    """A thread that shows the newest step of a run; use it as a context.

    On a terminal it is one live line with a bar; elsewhere plain lines, at most one every
    few seconds, and one for each evaluation.
    """

    def __init__(self, run_folder: Path, out: IO[str] | None = None) -> None:
        self.folder = run_folder
        self.out = out or sys.stdout  # as it is now: a run may send sys.stdout to a log
        self.began = time.monotonic()
        self._rows = RowFollower(run_folder / "metrics.jsonl")
        self._alarms = RowFollower(run_folder / "logs" / "alarms.jsonl")
        self._notices = RowFollower(run_folder / NOTICES)
        self._posted: deque[str] = deque()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._view: _Live | _Plain = _Live(self.out) if self.out.isatty() else _Plain(self.out)
        self._pace: list[tuple[int, float]] = []  # (step, time_s) of the last steps

    def __enter__(self) -> Progress:
        self._rows.skip()  # what an earlier start of the run wrote
        self._alarms.skip()
        self._notices.skip()
        self._view.open()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        self._view.close()

    def log(self, text: str) -> None:
        """Print a line without breaking the live one."""
        self._view.log(text)

    def post(self, text: str) -> None:
        """Have the thread print a line soon; for a signal handler, which must not wait or fail."""
        self._posted.append(text)

    def _follow(self) -> None:
        while not self._end.wait(POLL_S):
            self._show()
        self._show(final=True)

    def _show(self, final: bool = False) -> None:
        while self._posted:
            self._view.log(self._posted.popleft())
        plan = _read_json(self.folder / "logs" / "plan.json")
        total = int(plan.get("total_steps", 0))
        for notice in self._notices.read():
            self._view.log(notice["text"])
        rows = self._rows.read()
        for i, row in enumerate(rows):
            self._pace = [*self._pace[-20:], (row["step"], row.get("time_s", 0.0))]
            self._view.row(row, total, self._left_s(total), final and i == len(rows) - 1)
        for alarm in self._alarms.read():
            self._view.log(
                f"step {alarm['step']}: {alarm['level']}: {alarm['rule']}: {alarm['message']}\n"
                f"  fix: {alarm['fix']}"
            )
        if not rows:
            self._view.wait(time.monotonic() - self.began)

    def _left_s(self, total: int) -> float | None:
        """Seconds to the last step, at the pace of the last twenty."""
        if len(self._pace) < 2:
            return None
        (first, began), (last, now) = self._pace[0], self._pace[-1]
        return (total - last) * (now - began) / (last - first) if last > first else None


def describe(row: dict[str, Any], total: int, left_s: float | None) -> str:
    """`step 12/60  loss 1.2345  held-out 1.3456  5.1k tokens/s  0:42 left`."""
    parts = [f"step {row['step']}/{total}" if total else f"step {row['step']}"]
    if (loss := row.get("train/loss")) is not None:
        parts.append(f"loss {loss_of_log(loss)}")
    if (held_out := row.get("eval/loss")) is not None:
        parts.append(f"held-out loss {loss_of_log(held_out)}")
    parts += accuracy_text(row)
    if (pace := row.get("train/tokens_per_s")) is not None:
        parts.append(f"{rounded(pace)} tokens/s")
    if left_s is not None and total and row["step"] < total:
        parts.append(f"{clock(left_s)} left")
    return "  ".join(parts)


class _Plain:
    """Lines for a file or a pipe."""

    def __init__(self, out: IO[str]) -> None:
        self.out, self.last = out, float("-inf")

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def log(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def wait(self, seconds: float) -> None:
        pass

    def row(self, row: dict[str, Any], total: int, left_s: float | None, final: bool) -> None:
        now = time.monotonic()
        due = now - self.last >= QUIET_S or "eval/loss" in row or row["step"] == total or final
        if due:
            self.last = now
            self.log(describe(row, total, left_s))


class _Live:
    """One line that rewrites itself, with a bar."""

    def __init__(self, out: IO[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self.held_out: float | None = None
        self.console = Console(file=out)
        self.bar = RichProgress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task = self.bar.add_task("starting", total=None)

    def open(self) -> None:
        self.bar.start()

    def close(self) -> None:
        last = self.bar.tasks[0].description
        self.bar.stop()
        self.console.print(last, markup=False, highlight=False)

    def log(self, text: str) -> None:
        self.bar.print(text, markup=False, highlight=False)

    def wait(self, seconds: float) -> None:
        if not self.bar.tasks[0].total:
            self.bar.update(self.task, description=f"starting  {clock(seconds)}")

    def row(self, row: dict[str, Any], total: int, left_s: float | None, final: bool) -> None:
        # The held-out loss stays in sight between evaluations.
        self.held_out = row.get("eval/loss", self.held_out)
        if self.held_out is not None:
            row = {**row, "eval/loss": self.held_out}
        self.bar.update(
            self.task,
            total=total or None,
            completed=row["step"],
            description=describe(row, total, left_s),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
