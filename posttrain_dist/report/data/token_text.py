"""Conversations and a packed batch for the terminal: text as it is, what is trained on marked."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from posttrain_dist.report.data.answer_figures import names_of_answers, of_sample
from posttrain_dist.report.data.data_figures import SPLITS
from posttrain_dist.report.data.token_runs import Mark, Piece, Run, clean, hidden_name, runs
from posttrain_dist.report.numbers import share_of, times, whole

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

OPEN, CLOSE = "⟦", "⟧"  # around supervised text where there is no colour
_TIMES = "\N{MULTIPLICATION SIGN}"


def print_conversations(
    console: Console, report: dict[str, Any], color: bool, most: int | None
) -> None:
    """Print at most `most` conversations of each channel; None: all.

    Args:
        console: that prints text as it is.
        report: what data_report.json holds.
        color: mark what is supervised by colour, not by brackets.
    """
    groups = {name: found for name, found in (report.get("examples") or {}).items() if found}
    if not groups:
        return
    console.print()
    mark = "green" if color else f"between {OPEN} and {CLOSE}"
    console.print(f"conversations: what is trained on is {mark}", style="bold")
    for name, found in groups.items():
        for example in found[:most]:
            split = str(example.get("split", ""))
            parts = [name, example.get("where"), SPLITS.get(split, split).lower()]
            counts = (example.get("tokens"), "tokens"), (example.get("supervised"), "supervised")
            parts += [f"{whole(count)} {noun}" for count, noun in counts]
            _head(console, " · ".join(clean(str(part)) for part in parts if part))
            _print(console, example.get("pieces") or [], color)
            answers = example.get("answers") or []
            for answer, title in zip(answers, names_of_answers(answers), strict=True):
                console.print(f"  {title} · {whole(answer['tokens'])} tokens", style="cyan")
                _print(console, answer["pieces"], color)


def print_batch(console: Console, report: dict[str, Any], color: bool) -> None:
    """Print the samples of one packed batch; the arguments are those of `print_conversations`."""
    batch = report.get("batch") or {}
    pieces = batch.get("pieces") or []
    if not pieces:
        return
    tokens, samples = batch.get("tokens", len(pieces)), batch.get("samples")
    limit = (report.get("settings") or {}).get("max_length")
    fill = f" of {limit:,} ({share_of(tokens, limit)})" if limit else ""
    console.print()
    console.print(
        f"one packed batch: {tokens:,} tokens{fill}, {whole(samples)} samples", style="bold"
    )
    at = 0
    for sample, group in groupby(pieces, key=lambda piece: piece[3]):
        inside = list(group)
        end = at + len(inside)
        targets = sum(piece[1] > 0 for piece in inside)
        kind = of_sample(batch.get("units") or [], sample)
        parts = [f"sample {sample}", kind, f"tokens [{at:,}, {end:,})", f"{targets:,} supervised"]
        _head(console, " · ".join(filter(None, parts)))
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
    """The text of a run as it is, in brackets if it is supervised."""
    text = "".join(
        f"<{hidden_name(mark.text)}>" if mark.kind == "hidden" else mark.text
        for token in run.tokens
        for mark in token.marks
    )
    if run.weight <= 0:
        return text
    weight = "" if run.weight == 1 else f"{_TIMES}{times(run.weight)} "
    return f"{OPEN}{weight}{text}{CLOSE}"


def _coloured(found: list[Run]) -> Text:
    from rich.text import Text

    styled: list[tuple[str, str]] = []
    for run in found:
        supervised = run.weight > 0
        if run.weight not in (0, 1):
            styled.append(("reverse green", f"{_TIMES}{times(run.weight)}"))
        strength = "bold" if supervised else "dim"
        for token in run.tokens:
            colour = " magenta" if token.special else " green" if supervised else ""
            styled += [
                (f"{strength} yellow" if mark.kind else f"{strength}{colour}", _visible(mark))
                for mark in token.marks
            ]
    text = Text()
    for style, group in groupby(styled, key=lambda pair: pair[0]):
        text.append("".join(part for _, part in group), style=style)
    if not text.plain.endswith("\n"):
        text.append("\n")
    return text


def _visible(mark: Mark) -> str:
    if mark.kind == "hidden":
        return f"<{hidden_name(mark.text)}>"
    return {"space": "·", "tab": "→   ", "newline": "↵\n"}.get(mark.kind, mark.text)
