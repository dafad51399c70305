"""The table of runs: as text, live on a terminal, and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
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
NAMES, GAP = HEADS[:3], "  "  # names stand to the left, numbers to the right
SPARE = ("restarts", "job left", "job", "tokens/s", "run left")  # where they say nothing
LEAST_NAME = 12  # characters of a run's name that are always shown, the last ones
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
        width: characters that a line may have. Where that is little, columns that say nothing are
            left out, names are cut at their left, and reasons get lines of their own.
    """
    from rich.text import Text

    notes = [Text(f"note: {note}") for note in shown.notes]
    if not shown.runs:
        return [Text("no runs"), *notes]
    rows = [list(HEADS), *map(cells, shown.runs)]
    columns = _fitted([list(column) for column in zip(*rows, strict=True)], width)
    lines = [GAP.join(cell) for cell in zip(*map(_padded, columns), strict=True)]
    beside = any(run.reason for run in shown.runs) and width - len(lines[0]) >= LEAST_REASON
    heads = lines[0] + (GAP + REASON if beside else "")
    texts = [Text(heads.rstrip(), style="bold")]
    for run, line in zip(shown.runs, lines[1:], strict=True):
        text = Text((line + (GAP + run.reason if beside else "")).rstrip())
        text.highlight_regex(rf"(?<= ){run.state.value}(?= )", STYLES.get(run.state, ""))
        texts.append(text)
        if run.reason and not beside:
            texts.append(Text(" " * INDENT + run.reason))
    return texts + notes


def _fitted(columns: list[list[str]], width: int) -> list[list[str]]:
    """The columns that fit into `width`: without empty ones, if need be, and with shorter names."""

    def over() -> int:
        return sum(max(map(len, each)) + len(GAP) for each in columns) - len(GAP) - width

    for head in SPARE:
        if over() > 0:
            columns = [each for each in columns if each[0] != head or set(each[1:]) - {"-", "0"}]
    if (excess := over()) > 0:
        most = max(LEAST_NAME, max(map(len, columns[0])) - excess)
        columns[0] = [name if len(name) <= most else "…" + name[1 - most :] for name in columns[0]]
    return columns


def _padded(column: list[str]) -> list[str]:
    width = max(map(len, column))
    is_name = column[0] in NAMES
    return [cell.ljust(width) if is_name else cell.rjust(width) for cell in column]


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
