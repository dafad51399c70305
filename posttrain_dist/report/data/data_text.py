"""The data report for the terminal: verdict, tables, checks; conversations are in token_text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from posttrain_dist.report.data.answer_figures import answer_warnings, comparison_rows
from posttrain_dist.report.data.data_figures import (
    COUNTS,
    SPLITS,
    channel_table,
    channels_of,
    checks_of,
    left_out_total,
    rejected_total,
    source_rows,
    turns_line,
    verdict_of,
)
from posttrain_dist.report.data.histogram import half_length, sparkline
from posttrain_dist.report.data.token_runs import clean
from posttrain_dist.report.data.token_text import print_batch, print_conversations
from posttrain_dist.report.numbers import UNKNOWN, rounded, whole
from posttrain_dist.report.text_tables import GAP, styled_table, text_console, text_table

if TYPE_CHECKING:
    from rich.console import Console

MAX_REJECTED = 10
MAX_FAILING = 5  # rows of a check
_SIGNS = {"good": "✓", "warn": "!", "bad": "✗"}
_COLOURS = {"good": "green", "warn": "yellow", "bad": "red"}
_HEADS = {"truncated": "cut", "duplicates": "dup.", "near_duplicates": "near dup."}
_NAME = 24  # columns of a table that names have, as far as they need them
_ROUNDED_FROM = 100_000  # counts, in a narrow terminal
_NARROW = 110  # columns of a terminal below which large counts are rounded


def data_text(
    report: dict[str, Any], width: int, color: bool, *, conversations: int | None = None
) -> str:
    """A data report as text of at most `width` columns; conversations keep their own lines.

    Args:
        color: supervised text is green and special tokens are magenta, in ANSI codes of the 16
            colours; else supervised text stands between ⟦ and ⟧ and the text is plain.
        conversations: this many of each channel at most, of 0 also no batch; null: all.
    """
    out = io.StringIO()
    console = text_console(out, width, color=color)
    plain = clean({key: v for key, v in report.items() if key not in ("examples", "batch")})
    _verdict(console, plain)
    _channels(console, plain)
    _checks(console, plain)
    _rejected(console, plain)
    _sources(console, plain)
    lines = [line.rstrip(" ") for line in out.getvalue().split("\n")]  # tables are filled up
    out.seek(0)
    out.truncate()
    if conversations != 0:
        print_conversations(console, report, color, conversations)
        print_batch(console, report, color)
    return "\n".join(lines) + out.getvalue()


def formats_line(report: dict[str, Any]) -> str:
    """In which format the rows were read, source by source."""
    found = {file["source"]: file["format"] for file in report["files"]}
    names = set(found.values())
    listed = names.pop() if len(names) == 1 else ", ".join(f"{s}: {n}" for s, n in found.items())
    how = ", recognised from the first rows" if report["settings"]["format"] == "auto" else ""
    return f"format of the rows: {listed}{how}"


def counts_text(report: dict[str, Any]) -> str:
    """One line a channel and split, and below them what was left out: what a run begins with."""
    keys = ("rows", "tokens", "supervised", "truncated", "dropped", "duplicates")
    sides = {"train": "train", "eval": "held-out"}
    lines = [
        text_table(
            ("channel", "split", *keys),
            [
                (channel, side, *(whole(counts[key]) for key in keys))
                for channel in report["channels"]
                for split, side in sides.items()
                if (counts := report["splits"][split].get(channel))
            ],
            names=2,
        )
    ]
    if moved := report["duplicates_moved"]:
        lines.append(f"{moved} held-out rows also stood in train: left out")
    if leaks := report["near_leaks"]:
        lines.append(f"{leaks} held-out rows are much like a row of train")
    if rejected := rejected_total(report):
        lines.append(f"{rejected} rows could not be used: see data_report.html")
    if left_out := left_out_total(report):
        lines.append(f"{left_out} rows have the weight 0: left out")
    lines += filter(None, [turns_line(report)])
    lines += answer_warnings(report)
    for check in checks_of(report):
        if check["failed"] and check["level"] == "warning":
            what = f"{check['name']}, {check['failed']:,} rows: {check['explain']}"
            lines.append(f"{what}\n  {check['fix']}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- sections


def _verdict(console: Console, report: dict[str, Any]) -> None:
    verdict = verdict_of(report)
    name = f"{report['name']}: " if report.get("name") else ""
    colour = _COLOURS[verdict.tone]
    console.print(f"{_SIGNS[verdict.tone]} {name}{verdict.title}", style=f"bold {colour}")
    console.print(f"  {verdict.text}")
    for point in verdict.points:
        console.print(_signed(point.tone, point.text, indent=2))


def _channels(console: Console, report: dict[str, Any]) -> None:
    count = _short_count if console.width < _NARROW else whole
    for split, title in SPLITS.items():
        rows = channel_table(report, split, count)
        if not rows:
            continue
        columns: dict[str, list[str]] = {}
        unused = []  # columns of nothing but zeros
        for i, key in enumerate(COUNTS):
            cells = [row["cells"][i][1] for row in rows]
            head = _HEADS.get(key, key)
            if set(cells) == {"0"}:
                unused.append(head)
                continue
            columns[head] = cells
            if key == "supervised":
                columns["of tokens"] = [row["share"] for row in rows]
        names = [row["name"] for row in rows]
        room = console.width - min(_NAME, max(map(len, [title, *names]))) - GAP
        for heads in _fitting(columns, room):
            table = styled_table(title.lower(), _name_width(names), heads)
            for i, row in enumerate(rows):
                style = "bold" if row["total"] else "red" if row["starved"] else None
                table.add_row(row["name"], *(columns[head][i] for head in heads), style=style)
            console.print()
            console.print(table)
        if unused:
            console.print(f"none {', none '.join(unused)}", style="dim")
    _lengths(console, report)
    if moved := report.get("duplicates_moved"):
        console.print(
            f"{moved:,} held-out rows also stood in training: left out there", style="dim"
        )
    if left_out := left_out_total(report):
        console.print(f"{left_out:,} rows have the weight 0: left out", style="dim")
    if line := turns_line(report):
        console.print(line, style="dim")
    _comparisons(console, report)


def _comparisons(console: Console, report: dict[str, Any]) -> None:
    """What is compared in the training rows, and how long the answers are."""
    rows = comparison_rows(report, "train")
    if not rows:
        return
    heads = ("comparisons", "better", "worse", "times")
    title = "tokens of training answers"
    table = styled_table(title, _name_width([row["name"] for row in rows]), heads)
    for row in rows:
        cells = (row["comparisons"], row["better"], row["worse"], row["ratio"])
        table.add_row(row["name"], *cells, style="yellow" if row["biased"] else None)
    console.print()
    console.print(table)
    for line in answer_warnings(report):
        console.print(line, style="dim")


def _fitting(columns: dict[str, list[str]], width: int) -> list[list[str]]:
    """The heads of the columns, in as many tables as it takes."""
    tables: list[list[str]] = [[]]
    left = width
    for head, cells in columns.items():
        size = max(map(len, [head, *cells])) + GAP
        if size > left and tables[-1]:
            tables.append([])
            left = width
        tables[-1].append(head)
        left -= size
    return tables


def _lengths(console: Console, report: dict[str, Any]) -> None:
    train = (report.get("splits") or {}).get("train") or {}
    found = {name: train.get(name, {}).get("lengths") or [] for name in channels_of(report)}
    found = {name: lengths for name, lengths in found.items() if half_length(lengths)}
    if not found:
        return
    heads = ("half ≤", "all ≤", "shortest to longest")
    table = styled_table("lengths of training samples", _name_width(list(found)), heads)
    for channel, lengths in found.items():
        longest = max(int(edge) for edge, count in lengths if count)
        half = half_length(lengths)
        table.add_row(channel, whole(half), whole(longest), sparkline(lengths))
    console.print()
    console.print(table)


def _checks(console: Console, report: dict[str, Any]) -> None:
    checks = checks_of(report)
    if checks:
        console.print()
        console.print("checks", style="bold")
    for check in checks:
        tone = "good" if not check["failed"] else "bad" if check["level"] == "error" else "warn"
        counts = f"{check['failed']:,} of {check['checked']:,} fail"
        if not check["failed"]:
            counts = f"{check['checked']:,} checked"
        console.print(_signed(tone, f"{check['name']}  {counts}", indent=2))
        if not check["failed"]:
            continue
        for text in (check["explain"], check["fix"] and f"To fix it: {check['fix']}"):
            if text:
                console.print(_indented(text, 4))
        first = check["rows"][:MAX_FAILING]
        more = check["failed"] - len(first)
        after = f", and {more:,} more" if first and more > 0 else ""
        if first:
            console.print(_indented(f"{', '.join(first)}{after}", 4, "cyan"))


def _rejected(console: Console, report: dict[str, Any]) -> None:
    total, rejected = rejected_total(report), report.get("rejected") or []
    if not total:
        return
    console.print()
    console.print(f"rejected rows: {total:,}", style="bold")
    for row in rejected[:MAX_REJECTED]:
        line = "" if row.get("line") is None else f":{row['line']}"
        at = "" if row.get("byte") is None else f" (byte {row['byte']:,})"
        field = f"{row['field']} " if row.get("field") else ""
        console.print(_indented(f"{row.get('file', '')}{line}{at}", 2, "cyan"))
        fix = f"; {row['fix']}" if row.get("fix") else ""
        console.print(_indented(f"{field}{row.get('what', '')}{fix}", 4))
    if total > len(rejected[:MAX_REJECTED]):
        more = total - len(rejected[:MAX_REJECTED])
        console.print(f"  and {more:,} more, the first of them in data_report.html", style="dim")


def _sources(console: Console, report: dict[str, Any]) -> None:
    sources = source_rows(report)
    if not sources:
        return
    heads = ("asked", "of rows", "of tokens", "passes")
    table = styled_table("sources", _name_width([s["name"] for s in sources]), heads)
    for source in sources:
        shares = (share["text"] for share in source["shares"])
        table.add_row(source["name"], *shares, source["passes"])
    console.print()
    console.print(table)


def _indented(text: str, indent: int, style: str = "") -> Any:
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(text, style=style, overflow="fold"), (0, 0, 0, indent))


def _signed(tone: str, text: str, indent: int) -> Any:
    from rich.padding import Padding
    from rich.text import Text

    line = Text(_SIGNS[tone], style=_COLOURS[tone], overflow="fold")
    return Padding(line.append(f" {text}", style="default"), (0, 0, 0, indent))


def _name_width(names: list[str]) -> int:
    return min(_NAME, max(map(len, names)))


def _short_count(value: int | None) -> str:
    """A count, rounded where it has many digits."""
    if value is None:
        return UNKNOWN
    return rounded(value) if value >= _ROUNDED_FROM else whole(value)
