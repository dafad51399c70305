"""The data report for the terminal: verdict, tables, checks, conversations, one packed batch."""

from __future__ import annotations

import io
from itertools import groupby
from typing import TYPE_CHECKING, Any

from posttrain_dist.report.data.data_figures import (
    COUNTS,
    SPLITS,
    channel_table,
    channels_of,
    checks_of,
    rejected_total,
    source_rows,
    verdict_of,
    whole,
)
from posttrain_dist.report.data.histogram import half_length, sparkline
from posttrain_dist.report.data.token_runs import Mark, Piece, Run, clean, hidden_name, runs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

OPEN, CLOSE = "⟦", "⟧"  # around supervised text where there is no colour
SHOWN_REJECTED = 10
SHOWN_FAILING = 5  # rows of a check
_SIGNS = {"good": "✓", "warn": "!", "bad": "✗"}
_COLOURS = {"good": "green", "warn": "yellow", "bad": "red"}
_HEADS = {"truncated": "cut", "duplicates": "dup.", "near_duplicates": "near dup."}
_NAME = 24  # columns of a table that names have, as far as they need them
_TIMES = "\N{MULTIPLICATION SIGN}"
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
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
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
        _examples(console, report, color, conversations)
        _batch(console, report, color)
    return "\n".join(lines) + out.getvalue()


def formats_line(report: dict[str, Any]) -> str:
    """In which format the rows were read, source by source."""
    found = {file["source"]: file["format"] for file in report["files"]}
    names = set(found.values())
    listed = names.pop() if len(names) == 1 else ", ".join(f"{s}: {n}" for s, n in found.items())
    how = ", recognised from the first rows" if report["settings"]["format"] == "auto" else ""
    return f"format of the rows: {listed}{how}"


# ------------------------------------------------------------------------------------- numbers


def _verdict(console: Console, report: dict[str, Any]) -> None:
    verdict = verdict_of(report)
    name = f"{report['name']}: " if report.get("name") else ""
    colour = _COLOURS[verdict.tone]
    console.print(f"{_SIGNS[verdict.tone]} {name}{verdict.title}", style=f"bold {colour}")
    console.print(f"  {verdict.text}")
    for point in verdict.points:
        console.print(_signed(point.tone, point.text, indent=2))


def _channels(console: Console, report: dict[str, Any]) -> None:
    for split, title in SPLITS.items():
        rows = channel_table(report, split)
        if not rows:
            continue
        columns: dict[str, list[str]] = {}
        unused = []  # a column of nothing but zeros is said in words
        for i, key in enumerate(COUNTS):
            cells = [row["cells"][i][1] for row in rows]
            head = _HEADS.get(key, key)
            if set(cells) == {"0"}:
                unused.append(head)
                continue
            columns[head] = list(map(_compact, cells)) if console.width < _NARROW else cells
            if key == "supervised":
                columns["of tokens"] = [row["share"] for row in rows]
        names = [row["name"] for row in rows]
        room = console.width - min(_NAME, max(map(len, [title, *names]))) - 2
        for heads in _fitting(columns, room):
            table = _table(title.lower(), names, *heads)
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


def _fitting(columns: dict[str, list[str]], width: int) -> list[list[str]]:
    """The heads of the columns, in as many tables as it takes."""
    tables: list[list[str]] = [[]]
    left = width
    for head, cells in columns.items():
        size = max(map(len, [head, *cells])) + 2
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
    table = _table("lengths of training samples", list(found), *heads)
    for channel, lengths in found.items():
        longest = max(int(edge) for edge, count in lengths if count)
        half = half_length(lengths)
        table.add_row(channel, whole(half), f"{longest:,}", sparkline(lengths))
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
        for text in (check["explain"], check["fix"] and f"To mend it: {check['fix']}"):
            if text:
                console.print(_indented(text, 4))
        shown = check["rows"][:SHOWN_FAILING]
        more = check["failed"] - len(shown)
        after = f", and {more:,} more" if shown and more > 0 else ""
        if shown:
            console.print(_indented(f"{', '.join(shown)}{after}", 4, "cyan"))


def _rejected(console: Console, report: dict[str, Any]) -> None:
    total, rejected = rejected_total(report), report.get("rejected") or []
    if not total:
        return
    console.print()
    console.print(f"rejected rows: {total:,}", style="bold")
    for row in rejected[:SHOWN_REJECTED]:
        line = "" if row.get("line") is None else f":{row['line']}"
        at = "" if row.get("byte") is None else f" (byte {row['byte']:,})"
        field = f"{row['field']} " if row.get("field") else ""
        console.print(_indented(f"{row.get('file', '')}{line}{at}", 2, "cyan"))
        fix = f"; {row['fix']}" if row.get("fix") else ""
        console.print(_indented(f"{field}{row.get('what', '')}{fix}", 4))
    if total > len(rejected[:SHOWN_REJECTED]):
        more = total - len(rejected[:SHOWN_REJECTED])
        console.print(f"  and {more:,} more, the first of them in data_report.html", style="dim")


def _sources(console: Console, report: dict[str, Any]) -> None:
    sources = source_rows(report)
    if not sources:
        return
    table = _table(
        "sources", [s["name"] for s in sources], "asked", "of rows", "of tokens", "passes"
    )
    for source in sources:
        shares = (share["text"] for share in source["shares"])
        table.add_row(source["name"], *shares, source["passes"])
    console.print()
    console.print(table)


def _table(title: str, names: list[str], *heads: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(title, overflow="fold", min_width=min(_NAME, max(map(len, names))))
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _indented(text: str, indent: int, style: str = "") -> Any:
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(text, style=style, overflow="fold"), (0, 0, 0, indent))


def _signed(tone: str, text: str, indent: int) -> Any:
    from rich.padding import Padding
    from rich.text import Text

    line = Text(_SIGNS[tone], style=_COLOURS[tone], overflow="fold")
    return Padding(line.append(f" {text}", style="default"), (0, 0, 0, indent))


def _compact(text: str) -> str:
    """A count of many digits, rounded: 57.8M."""
    digits = text.replace(",", "")
    if not digits.isdigit() or len(digits) < 6:
        return text
    power, unit = (9, "G") if len(digits) > 9 else (6, "M") if len(digits) > 6 else (3, "k")
    return f"{int(digits) / 10**power:.3g}{unit}"


# ------------------------------------------------------------------------------------- tokens


def _examples(
    console: Console, report: dict[str, Any], color: bool, conversations: int | None
) -> None:
    groups = {name: found for name, found in (report.get("examples") or {}).items() if found}
    if not groups:
        return
    console.print()
    learned = "green" if color else f"between {OPEN} and {CLOSE}"
    console.print(f"conversations: what is learned is {learned}", style="bold")
    for name, found in groups.items():
        for example in found[:conversations]:
            split = str(example.get("split", ""))
            parts = [name, example.get("where"), SPLITS.get(split, split).lower()]
            counts = (example.get("tokens"), "tokens"), (example.get("supervised"), "supervised")
            parts += [f"{whole(count)} {noun}" for count, noun in counts]
            _head(console, " · ".join(clean(str(part)) for part in parts if part))
            _print(console, example.get("pieces") or [], color)


def _batch(console: Console, report: dict[str, Any], color: bool) -> None:
    batch = report.get("batch") or {}
    pieces = batch.get("pieces") or []
    if not pieces:
        return
    tokens, samples = batch.get("tokens", len(pieces)), batch.get("samples")
    limit = (report.get("settings") or {}).get("max_length")
    fill = f" of {limit:,} ({tokens / limit:.1%})" if limit else ""
    console.print()
    console.print(
        f"one packed batch: {tokens:,} tokens{fill}, {whole(samples)} samples", style="bold"
    )
    at = 0
    for sample, group in groupby(pieces, key=lambda piece: piece[3]):
        inside = list(group)
        end = at + len(inside)
        targets = sum(piece[1] > 0 for piece in inside)
        _head(console, f"sample {sample} · tokens [{at:,}, {end:,}) · {targets:,} supervised")
        _print(console, inside, color)
        at = end


def _head(console: Console, text: str) -> None:
    console.print()
    console.print(f"── {text}", style="cyan", soft_wrap=True)


def _print(console: Console, pieces: list[Piece], color: bool) -> None:
    found = runs(pieces)
    if not color:
        text = "".join(map(_bracketed, found))
        console.file.write(text.removesuffix("\n") + "\n")  # rich would expand the tabs
        return
    console.print(_coloured(found), soft_wrap=True, end="")


def _bracketed(run: Run) -> str:
    """The text of a run as it is, in brackets if it is learned."""
    text = "".join(
        f"<{hidden_name(mark.text)}>" if mark.kind == "hidden" else mark.text
        for token in run.tokens
        for mark in token.marks
    )
    if run.weight <= 0:
        return text
    weight = "" if run.weight == 1 else f"{_TIMES}{run.weight:.4g} "
    return f"{OPEN}{weight}{text}{CLOSE}"


def _coloured(found: list[Run]) -> Text:
    from rich.text import Text

    styled: list[tuple[str, str]] = []
    for run in found:
        learned = run.weight > 0
        if run.weight not in (0, 1):
            styled.append(("reverse green", f"{_TIMES}{run.weight:.4g}"))
        strength = "bold" if learned else "dim"
        for token in run.tokens:
            colour = " magenta" if token.special else " green" if learned else ""
            styled += [
                (f"{strength} yellow" if mark.kind else f"{strength}{colour}", _shown(mark))
                for mark in token.marks
            ]
    text = Text()
    for style, group in groupby(styled, key=lambda pair: pair[0]):
        text.append("".join(part for _, part in group), style=style)
    if not text.plain.endswith("\n"):
        text.append("\n")
    return text


def _shown(mark: Mark) -> str:
    if mark.kind == "hidden":
        return f"<{hidden_name(mark.text)}>"
    return {"space": "·", "tab": "→   ", "newline": "↵\n"}.get(mark.kind, mark.text)
