"""Tokens of a conversation as runs of one weight, with what is invisible made visible.

A piece is `[text, weight, is special]`, as data_report.json holds it; one per token.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

Piece = Sequence[Any]

# Joiners are invisible too, but part of ordinary text in many scripts and of emoji.
_JOINERS = "\u200c\u200d"
_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}
_RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
_NOT_PLAIN = re.compile(r"[^!-~]")


@dataclass(slots=True)
class Mark:
    """A stretch of text. `kind`: "" as it is, space, tab, newline, or hidden (no glyph)."""

    kind: str
    text: str


@dataclass(slots=True)
class Token:
    """One token of a run."""

    marks: list[Mark]
    special: bool


@dataclass(slots=True)
class Run:
    """Neighbouring tokens of the same weight as targets; 0 is masked."""

    weight: float
    tokens: list[Token]


def runs(pieces: Iterable[Piece]) -> list[Run]:
    """Group tokens by weight and mark what of their whitespace a reader would miss.

    Spaces are marked at the edges of a run, of a line and of a special token, and where there are
    several: there one too many or too few changes what is trained on, and cannot be seen.
    """
    found = []
    for weight, group in groupby(pieces, key=lambda piece: float(piece[1])):
        inside = [(str(piece[0]), bool(piece[2])) for piece in group]
        tokens = []
        for i, (text, special) in enumerate(inside):
            before = _edge(inside[i - 1], special, -1) if i else "\n"
            after = _edge(inside[i + 1], special, 0) if i + 1 < len(inside) else "\n"
            tokens.append(Token(_marks(text, before, after), special))
        found.append(Run(weight, tokens))
    return found


def clean(value: Any) -> Any:
    """Strings of nested JSON with what has no glyph spelled out, so that any output can hold it.

    Without this, a lone surrogate cannot be written, an escape sequence drives the terminal, and
    a right-to-left override turns the rest of the line around.
    """
    if isinstance(value, str):
        return _NOT_PLAIN.sub(_spell_out, value)
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


def reads_right_to_left(text: str) -> bool:
    """Whether the first letter with a direction is one of Hebrew, Arabic or their like."""
    if not _RIGHT_TO_LEFT.search(text):
        return False
    directions = map(unicodedata.bidirectional, text)
    return next((d for d in directions if d in ("L", "R", "AL")), "L") != "L"


@lru_cache(maxsize=4096)
def hidden_name(char: str) -> str:
    """`U+200B` of a character that has no glyph of its own; empty for all others."""
    if char in " \n\t" or char in _JOINERS or unicodedata.category(char) not in _HIDDEN:
        return ""
    return f"U+{ord(char):04X}"


def _spell_out(match: re.Match[str]) -> str:
    name = hidden_name(match[0])
    return f"<{name}>" if name else match[0]


def _edge(neighbour: tuple[str, bool], special: bool, at: int) -> str:
    """The neighbour's character next to this token; special tokens end a text like a line."""
    text, other_special = neighbour
    return "\n" if special or other_special or not text else text[at]


def _marks(text: str, before: str, after: str) -> list[Mark]:
    found: list[Mark] = []
    for kind, part in _kinds(text, before, after):
        if found and found[-1].kind == kind == "":
            found[-1].text += part
        else:
            found.append(Mark(kind, part))
    return found


def _kinds(text: str, before: str, after: str) -> Iterator[tuple[str, str]]:
    start = 0
    around = f"{before}{text}{after}"
    for match in _NOT_PLAIN.finditer(text):
        at, char = match.start(), match[0]
        if char == " ":
            beside = around[at].isspace() or around[at + 2].isspace()
            kind = "space" if beside else ""
        elif char in "\n\t":
            kind = "newline" if char == "\n" else "tab"
        else:
            kind = "hidden" if hidden_name(char) else ""
        if kind:
            if at > start:
                yield "", text[start:at]
            yield kind, char
            start = at + 1
    if start < len(text):
        yield "", text[start:]
