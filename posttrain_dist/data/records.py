"""Read JSONL rows and check every field: one function per row format.

{"messages": [{"role": "user", "content": "..."}, ...], "task_type": "...", "check": "exact"}
{"text": "...", "task_type": "..."}
"""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain_dist.errors import DataError, PosttrainError, raise_all
from posttrain_dist.flow import Record

MAX_ERRORS = 20  # reading stops after so many; they are reported together
ROLES = ("system", "user", "assistant", "tool")
FORMATS = {
    "messages": '{"messages": [{"role": "user", "content": "..."}, '
    '{"role": "assistant", "content": "..."}], "task_type": "..."}',
    "text": '{"text": "...", "task_type": "..."}',
}
_OPTIONAL = {"task_type", "check"}
# Keys that would change what is trained; any other unknown key is the user's own note.
_NOT_SUPPORTED = {"tools", "functions", "documents", "images", "weight", "chosen", "rejected"}


class _RowError(Exception):
    """What is wrong in one row; `at` is the byte in the line, where that is known."""

    def __init__(self, what: str, fix: str, at: int = 0) -> None:
        super().__init__(what)
        self.what, self.fix, self.at = what, fix, at


def read_records(path: str, rows: str) -> list[Record]:
    """Every row of a file, a folder's *.jsonl (by name) or a glob, in file order.

    Args:
        path: file, folder or glob.
        rows: the format that the objective trains on, "messages" or "text".

    Raises:
        DataError, SeveralErrors: up to 20 faults, each with file:line, byte and field.
    """
    parse = _PARSERS[rows]
    records: list[Record] = []
    problems: list[PosttrainError] = []
    for file in find_files(path):
        before = len(records) + len(problems)
        for number, offset, line in _lines(file):
            where = f"{file}:{number}"
            try:
                records.append(parse(_load(line), file.stem, where))
            except _RowError as error:
                place = f"{where} (byte {offset + error.at})"
                problems.append(DataError(error.what, where=place, fix=error.fix))
                if len(problems) >= MAX_ERRORS:
                    raise_all(problems)
        if len(records) + len(problems) == before:
            problems.append(
                DataError("holds no row", where=str(file), fix="fill the file or leave it out")
            )
    raise_all(problems)
    return records


def find_files(path: str) -> list[Path]:
    """The files that a path means, sorted by name.

    Raises:
        DataError: there are none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = sorted(p for p in place.glob("*.jsonl") if p.is_file())
        what = "the folder holds no *.jsonl file"
    else:
        found = glob.glob(str(place), recursive=True)  # noqa: PTH207 - may be absolute
        files = sorted(Path(name) for name in found if Path(name).is_file())
        what = "no file has this name"
    if not files:
        raise DataError(
            what, where=str(path), fix="give a JSONL file, a folder of *.jsonl files or a glob"
        )
    return files


# ----------------------------------------------------------------------------- bytes to JSON


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number, byte offset, line without its end); lines end at LF and nowhere else."""
    offset = 0
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                start = offset
                offset += len(line)
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    line, start = line[3:], 3
                line = line.rstrip(b"\r\n")
                if line.strip():
                    yield number, start, line
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}", where=str(file), fix="check its permissions"
        ) from error


def _load(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RowError(
            f"is not valid UTF-8: {error.reason}", "save the file as UTF-8", error.start
        ) from error
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode())
        raise _RowError(
            f"is not valid JSON: {error.msg}, column {error.pos + 1}",
            "write one JSON object a line",
            at,
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 10^4 brackets
        raise _RowError(f"cannot be read as JSON: {error}", "write one JSON object") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RowError(f"key {twice!r} stands twice in one object", "keep one of them")
    return row


# ----------------------------------------------------------------------------- JSON to Record


def _parse_messages(row: Any, stem: str, where: str) -> Record:
    channel, check = _common(row, "messages", stem)
    value = row["messages"]
    if not isinstance(value, list) or not value:
        raise _RowError(
            f"messages is {_kind(value)}, expected a list of turns", FORMATS["messages"]
        )
    messages = tuple(_message(turn, f"messages[{i}]") for i, turn in enumerate(value))
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise _RowError(
            "messages has no assistant turn, so there is nothing to learn from this row",
            'add {"role": "assistant", "content": "..."} or remove the row',
        )
    if check and roles[-1] != "assistant":
        raise _RowError(
            'check is "exact" and the last turn is no assistant turn', "end with the right answer"
        )
    return Record(channel=channel, where=where, messages=messages, check=check)


def _parse_text(row: Any, stem: str, where: str) -> Record:
    channel, check = _common(row, "text", stem)
    if check:
        raise _RowError("check needs messages, and this is a text row", "remove check")
    text = _text(row["text"], "text")
    if not text:
        raise _RowError("text is empty", "remove the row")
    return Record(channel=channel, where=where, text=text)


_PARSERS: dict[str, Callable[[Any, str, str], Record]] = {
    "messages": _parse_messages,
    "text": _parse_text,
}


def _common(row: Any, key: str, stem: str) -> tuple[str, str | None]:
    """Check the set of keys; give (channel, check)."""
    expected = f"this objective reads rows such as {FORMATS[key]}"
    if not isinstance(row, dict):
        raise _RowError(f"is {_kind(row)}, expected an object", expected)
    if key not in row:
        keys = ", ".join(sorted(row)) or "none"
        raise _RowError(f"has no key {key!r} (keys: {keys})", expected)
    known = {key, *_OPTIONAL}
    for name in row.keys() - known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if near:
            raise _RowError(f"unknown key {name!r}", f"write {near[0]!r}, or rename the key")
        if name in _NOT_SUPPORTED | (FORMATS.keys() - {key}):
            raise _RowError(f"key {name!r} is not supported beside {key!r}", expected)
    channel = _text(row.get("task_type", stem), "task_type")
    if not channel.strip() or not channel.isprintable():
        raise _RowError(
            f"task_type is {channel!r}", "give a short printable name: it names the channel"
        )
    check = row.get("check")
    if check not in (None, "exact"):
        raise _RowError(f'check is {check!r}, the only one is "exact"', 'use "exact" or leave out')
    return channel, check


def _message(turn: Any, path: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise _RowError(f"{path} is {_kind(turn)}, expected an object", FORMATS["messages"])
    for name in ("role", "content"):
        if name not in turn:
            raise _RowError(f"{path} has no key {name!r}", FORMATS["messages"])
    # Exports often carry "tool_calls": null; with a value such keys would change the text.
    extra = sorted(k for k, v in turn.items() if k not in ("role", "content") and v is not None)
    if extra:
        raise _RowError(f"{path}.{extra[0]} is not supported", "keep role and content only")
    role = turn["role"]
    if role not in ROLES:
        raise _RowError(f"{path}.role is {role!r}", f"use one of {', '.join(ROLES)}")
    return {"role": role, "content": _text(turn["content"], f"{path}.content")}


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _RowError(f"{path} is {_kind(value)}, expected text", "write it as a JSON string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _RowError(
            f"{path} holds half a surrogate pair at character {error.start}",
            "write the whole pair, or the character itself",
        ) from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
