"""The table of runs: as text, live on a terminal, and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from posttrain_dist.report.numbers import clock, loss_of_log, rounded
from posttrain_launch.status.run_state import RunState, RunStatus, Survey

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

HEADS = (
    "run",
    "job",
    "state",
    "step",
    "loss",
    "tokens/s",
    "run left",
    "job left",
    "restarts",
)
NAMES, GAP = 3, "  "  # this many at the left are names; the others stand to the right
REASON, INDENT = "reason", 4  # the last column, or lines below a row on a narrow terminal
LEAST_REASON = 30  # characters of it that are worth a column
STYLES = {
    RunState.finished: "green",
    RunState.running: "bold",
    RunState.failed: "red",
    RunState.ended: "red",
    RunState.pending: "yellow",
    RunState.requeued: "yellow",
    RunState.stopping: "yellow",
}


def table_lines(shown: Survey, width: int) -> list[Text]:
    """The table, a line each, and the notes below it; `rich` texts, `.plain` of which is text.

    Args:
        width: characters that a line may have; reasons get lines of their own where it is narrow.
    """
    from rich.text import Text

    if not shown.runs:
        return [Text("no runs")] + [Text(f"note: {note}") for note in shown.notes]
    rows = [cells(run) for run in shown.runs]
    widths = [max(len(row[i]) for row in [HEADS, *rows]) for i in range(len(HEADS))]
    used = sum(widths) + len(GAP) * len(widths)
    beside = any(run.reason for run in shown.runs) and width - used >= LEAST_REASON
    head = _padded(HEADS, widths) + (GAP + REASON if beside else "")
    lines = [Text(head.rstrip(), style="bold")]
    for run, row in zip(shown.runs, rows, strict=True):
        line = Text(_padded(row, widths))
        start = sum(widths[: NAMES - 1]) + len(GAP) * (NAMES - 1)
        line.stylize(STYLES.get(run.state, ""), start, start + widths[NAMES - 1])
        if beside:
            line.append(GAP + run.reason)
        line.rstrip()
        lines.append(line)
        if run.reason and not beside:
            lines.append(Text(" " * INDENT + run.reason))
    return lines + [Text(f"note: {note}") for note in shown.notes]


def cells(run: RunStatus) -> list[str]:
    """The cells of a run, as text, one for each of HEADS."""
    step = "-" if run.step is None else str(run.step)
    if run.total_steps:
        step = f"{run.step or 0}/{run.total_steps}"
    return [
        run.run,
        run.job or "-",
        run.state.value,
        step,
        loss_of_log(run.loss),
        "-" if run.tokens_per_s is None else rounded(run.tokens_per_s),
        "-" if run.run_left_s is None else clock(run.run_left_s),
        "-" if run.job_left_s is None else clock(run.job_left_s),
        str(run.restarts),
    ]


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    pairs = enumerate(zip(row, widths, strict=True))
    return GAP.join(
        cell.ljust(width) if i < NAMES else cell.rjust(width) for i, (cell, width) in pairs
    )


def table_json(shown: Survey) -> str:
    """`{"runs": [...], "notes": [...]}`; times in seconds, folders as text."""
    rows: list[dict[str, Any]] = []
    for run in shown.runs:
        row = {**asdict(run), "state": run.state.value}
        row["folder"] = None if run.folder is None else str(run.folder)
        rows.append(row)
    return json.dumps({"runs": rows, "notes": list(shown.notes)}, indent=1)


def watch(look: Callable[[], Survey], console: Console, every_s: float) -> None:
    """Show the table again and again until Ctrl-C, the rows that fit on the terminal.

    Args:
        look: finds out how things stand now.
        every_s: between two looks.
    """
    from rich.console import Group
    from rich.live import Live

    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        while True:
            now = time.strftime("%H:%M:%S")
            lines = table_lines(look(), console.width)
            for line in lines:
                line.truncate(console.width, overflow="ellipsis")
            live.update(
                Group(*lines, f"{now}, every {every_s:g} s; Ctrl-C ends this"), refresh=True
            )
            time.sleep(every_s)
