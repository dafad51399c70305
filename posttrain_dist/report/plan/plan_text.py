"""A plan for the terminal: verdict, bars of what takes the memory, phases, time, command."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain_dist.report.numbers import memory
from posttrain_dist.report.plan.fallback_rows import FALLBACK_HEADS, fallback_rows
from posttrain_dist.report.plan.plan_figures import (
    Bar,
    command_of,
    command_title,
    device_word,
    hardware_of,
    item_bars,
    phase_bars,
    room_lines,
    scale_of,
    speed_lines,
    storage_lines,
    subject_of,
    time_bars,
    total_lines,
    verdict_of,
)
from posttrain_dist.report.text_tables import styled_table, text_console

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 88  # columns, where nobody says
_NAME, _NUMBER, _NOTE = 34, 10, 6  # columns of a line with a bar
_FOLDED = 15  # columns that names of the table of fallbacks have at least
_EIGHTHS = " ▏▎▍▌▋▊▉"


def plan_text(
    plan: Mapping[str, Any],
    typed: Sequence[str] | None = None,
    *,
    verb: str = "train",
    width: int = WIDTH,
    color: bool = False,
) -> str:
    """A plan, from its JSON, as text of at most `width` columns, but for the command.

    Args:
        typed: overrides that were typed, for the command that trains it; None: no command.
        verb: of that command: train or submit.
        color: with the ANSI codes of the 16 colours.
    """
    out = io.StringIO()
    console = text_console(out, width, color=color)
    _verdict(console, plan)
    _memory(console, plan)
    _speed(console, plan)
    text = _stripped(out.getvalue())
    if typed is None:
        return text
    # One line, however long: what is copied from the terminal must run.
    command = shlex.join(["posttrain", verb, *command_of(plan, typed)])
    return f"{text}\n\n{command_title(plan)}\n  {command}"


def plan_table(choice: Mapping[str, Any], *, width: int = WIDTH, color: bool = False) -> str:
    """Every fallback, one a line, from the JSON of a choice: fits or not, by how much, and cost."""
    out = io.StringIO()
    console = text_console(out, width, color=color)
    rows = fallback_rows(choice)
    table = styled_table("fallback", _FOLDED, [head for head in FALLBACK_HEADS if head != "hours"])
    item = table.columns[1 + FALLBACK_HEADS.index("most goes to")]
    item.no_wrap, item.min_width, item.justify = False, _FOLDED, "left"
    for row in rows:
        cells = (row.mark, row.spare, row.item, row.tokens_per_s, row.gpu_hours)
        style = "bold green" if row.chosen else None if row.fits else "dim"
        table.add_row(row.name, *cells, style=style)
    console.print(table)
    notes = [f"{row.name}: {row.reason}" for row in rows if row.reason]
    notes += [f"GPU-hours for {tokens} tokens" for tokens in {row.tokens for row in rows} if tokens]
    _lines(console, notes, "dim")
    return _stripped(out.getvalue())


# ------------------------------------------------------------------------------------- sections


def _verdict(console: Console, plan: Mapping[str, Any]) -> None:
    verdict = verdict_of(plan)
    sign, colour = ("✓", "green") if verdict.fits else ("✗", "red")
    console.print(f"{sign} {verdict.title}", style=f"bold {colour}")
    _lines(console, [verdict.text])
    for warning in plan["warnings"]:
        _lines(console, [f"! {warning}"], "yellow")
    _title(console, "planned")
    _pairs(console, subject_of(plan))
    if hardware := hardware_of(plan):
        _title(console, "one node")
        _pairs(console, hardware)


def _memory(console: Console, plan: Mapping[str, Any]) -> None:
    device, capacity = plan["device"], plan["capacity_bytes"]
    one = device_word(plan)
    _title(console, f"each {one} at its peak, {device['peak_phase']}")
    _bars(console, item_bars(device))
    _sums(console, total_lines(device, host=False))
    margin = plan["margin_bytes"]
    kept = f", {memory(margin)} of them kept free" if margin else ""
    _lines(console, [f"of {memory(capacity)}{kept}"], "dim")
    is_all = scale_of(device["allocated_bytes"], capacity) == capacity
    full = "all its memory" if is_all else "the fullest of them"
    _title(console, f"phases of a {one}, allocated; a full bar is {full}")
    _bars(console, phase_bars(device, capacity))
    _lines(console, room_lines(device, one), "dim")
    host = plan["host"]
    if host["phases"]:
        _title(console, f"the fullest host at its peak, {host['peak_phase']}")
        _bars(console, item_bars(host))
        _sums(console, total_lines(host, host=True))
        _lines(console, [f"of {memory(plan['host_capacity_bytes'])}"], "dim")


def _speed(console: Console, plan: Mapping[str, Any]) -> None:
    _title(console, "disk and network")
    _pairs(console, storage_lines(plan))
    _title(console, "time of a step; terms may overlap")
    _bars(console, time_bars(plan["speed"]))
    _pairs(console, speed_lines(plan))


# ---------------------------------------------------------------------------------------- lines


def _title(console: Console, title: str) -> None:
    console.print()
    console.print(title, style="bold")


def _lines(console: Console, lines: Sequence[str], style: str = "") -> None:
    from rich.padding import Padding
    from rich.text import Text

    for line in lines:
        console.print(Padding(Text(line, style=style, overflow="fold"), (0, 0, 0, 2)))


def _pairs(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    from rich.padding import Padding
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, value)
    console.print(Padding(table, (0, 0, 0, 2)))


def _sums(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    for i, (name, value) in enumerate(pairs):
        last = i == len(pairs) - 1
        space = _bar_width(console)
        line = f"  {name:<{_NAME}}  {'':<{space}}{value:>{_NUMBER}}"
        console.print(line, style="bold" if last else "")


def _bars(console: Console, bars: Sequence[Bar]) -> None:
    from rich.text import Text

    width = _bar_width(console)
    for bar in bars:
        line = Text(f"  {bar.name:<{_NAME}.{_NAME}}  ")
        line.append(f"{_blocks(bar.share, width - 1):<{width}}", style="blue")
        line.append(f"{bar.text:>{_NUMBER}}").append(f"  {bar.note:>{_NOTE}}", style="dim")
        console.print(line, no_wrap=True, overflow="crop")


def _bar_width(console: Console) -> int:
    return max(4, console.width - _NAME - _NUMBER - _NOTE - 6)


def _blocks(share: float, width: int) -> str:
    eighths = round(8 * width * share)
    if share > 0:
        eighths = max(1, eighths)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def _stripped(text: str) -> str:
    """Without the blanks that fill lines up."""
    return "\n".join(line.rstrip(" ") for line in text.rstrip("\n").split("\n"))
