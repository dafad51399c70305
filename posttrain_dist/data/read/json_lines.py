"""Bytes to JSON: lines that end at LF and nowhere else, each read strictly and located.

orjson reads a line fast but too kindly: of a key that stands twice it keeps the last, and an
integer above 64 bits becomes a float. A line that may hold either is read again by `json`, exactly;
so is one that orjson refuses, for the reason in words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any, NoReturn

import orjson

from posttrain_dist.data.read.bad_row import BadRow

# About two million tokens, more than any context. A row in work is held up to eight times (bytes,
# orjson's copy, text, which takes two or four bytes a character where one is not Latin, the copy
# that is counted, the row before), and all that stays below 64 MiB and one such line.
MAX_LINE_BYTES = 8 << 20
MAX_DEPTH = 254  # objects and lists inside each other; as deep as orjson writes
BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n\x0b\x0c"
TOO_LONG = f"is longer than {MAX_LINE_BYTES >> 20} MiB, the longest that is read"
SPLIT_IT = "split the row into several"

_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_ESCAPED_COLON = re.compile(rb"\\u003[aA]")
_LONG_NUMBER = b"0" * 19  # from here on an integer may not fit into 64 bits

Line = tuple[int, int, bytes | None]  # number, byte of its start, content; null: too long


def read_lines(
    stream: IO[bytes], *, number: int = 1, start: int = 0, end: int | None = None
) -> Iterator[Line]:
    """The lines of a stream that are not blank, without their ends; none is held above the limit.

    Args:
        stream: stands at byte `start`.
        number: of the first line.
        start: byte in the file; a byte order mark is dropped at 0 only.
        end: byte where to stop, the start of a line; null: the end of the stream.
    """
    while end is None or start < end:
        line = stream.readline(MAX_LINE_BYTES + 2)
        if not line:
            return
        size = len(line)
        ended = line.endswith(b"\n")
        content = line.rstrip(b"\r\n")
        del line  # a long one is held once
        if len(content) > MAX_LINE_BYTES:
            del content
            size += 0 if ended else _skip_line(stream)
            yield number, start, None
        elif start == 0 and content.startswith(BOM):
            if content[len(BOM) :].strip(BLANK):
                yield number, len(BOM), content[len(BOM) :]
        elif content and not content.isspace():
            yield number, start, content
        content = b""
        start += size
        number += 1


def _skip_line(stream: IO[bytes]) -> int:
    """Read on to behind the next LF; the number of bytes."""
    skipped = 0
    while block := stream.readline(1 << 20):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def load(line: bytes) -> Any:
    """One JSON value, read strictly.

    Raises:
        BadRow: invalid UTF-8 or JSON, a key twice in one object, NaN or a number as large as to
            be infinite, half a surrogate pair, more than 254 levels.
    """
    try:
        row = orjson.loads(line)
        # Each key has its colon, so a dropped key leaves the copy with fewer of them. Only an
        # escaped colon could make up for it.
        if (
            line.count(b":") == orjson.dumps(row).count(b":")
            and (b"\\u003" not in line or not _ESCAPED_COLON.search(line))
            and _LONG_NUMBER not in line.translate(_DIGITS_TO_ZERO)
        ):
            return row
        del row
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        pass  # the slow way says why
    return _load_exactly(line)


def _load_exactly(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            f"is not valid UTF-8: {error.reason}", "save the file as UTF-8", at=error.start
        ) from error
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise BadRow(
            f"is not valid JSON: {error.msg}, column {error.pos + 1}",
            "write one JSON object a line",
            at=len(text[: error.pos].encode()),
        ) from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # a number of 5000 digits
        reason = str(error).partition(";")[0]
        raise BadRow(f"cannot be read as JSON: {reason}", "write it as text") from error
    _check_values(row)
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow(
            f"key {twice!r} stands twice in one object", "keep one of them", field=_shown(twice)
        )
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise BadRow(f"is not valid JSON: {name} is no JSON number", "write null, or leave the key out")


def _too_deep() -> BadRow:
    what = f"cannot be read as JSON: objects and lists stand more than {MAX_DEPTH} deep"
    return BadRow(what, "write one flat JSON object a line")


def _check_values(row: Any) -> None:
    """Refuse what `json` lets through; without recursion, as rows may be deep."""
    waiting: list[tuple[Any, str, int]] = [(row, "", 1)]
    while waiting:
        value, path, depth = waiting.pop()
        if isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, float) and value in (float("inf"), float("-inf")):
            raise BadRow(
                f"{path} is a number too large to hold".lstrip(), "write it as text", field=path
            )
        elif isinstance(value, dict | list) and depth > MAX_DEPTH:
            raise _too_deep()
        elif isinstance(value, dict):
            for key, item in value.items():
                below = f"{path}.{key}" if path else key
                _check_text(key, _shown(below))
                waiting.append((item, below, depth + 1))
        elif isinstance(value, list):
            waiting += [(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]


def _check_text(value: str, path: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{path} holds half a surrogate pair at character {error.start}".lstrip(),
            "write the whole pair, or the character itself",
            field=path,
        ) from error


def _shown(path: str) -> str:
    """A path that can be printed: half a surrogate pair cannot."""
    return path.encode("utf-8", "backslashreplace").decode()
