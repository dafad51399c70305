"""A JSON file that is one array: its elements, found without reading the whole file at once.

Written by hand because ijson (3.6, yajl2_c) gives no position of an element, ends the file at the
first one that is not valid UTF-8 or JSON, holds the whole of one that is too long, keeps one of two
equal keys, and makes "?" of half a surrogate pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

from posttrain_dist.data.read.bad_row import BadFile
from posttrain_dist.data.read.json_lines import BLANK, BOM, MAX_LINE_BYTES, Line

_BLOCK_BYTES = 1 << 20
# A whole string, or a character that opens, closes or parts; a quote alone: the string goes on.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|["\[\]{},]', re.DOTALL)
_STRING = re.compile(rb'(?:[^"\\]|\\.)*+("?)', re.DOTALL)  # what is left of one, and its end
_BETWEEN = re.compile(rb"[\s:0-9+\-.eEtrufalsn]*")  # strings and brackets: numbers, true, null ...
_CLOSE = "look for a quote that is not closed"
_LEVELS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


def is_array(stream: IO[bytes]) -> bool:
    """Whether the first character is `[`; reads from the start of the stream."""
    return stream.read(1 << 16).removeprefix(BOM).lstrip(BLANK).startswith(b"[")


def read_elements(stream: IO[bytes]) -> Iterator[Line]:
    """(line, byte, text) of each element, unparsed; the stream stands at its start.

    The text is null where it is longer than the limit.

    Raises:
        BadFile: the array does not end, an element is missing, or something follows the array.
    """
    window = _Window(stream)
    window.find(b"[")
    number, end = 0, b","
    while end != b"]":
        line, start, text, end = window.element()
        if text is None:
            yield line, start, None
        elif content := text.strip(BLANK):
            lead = text.index(content[:1])
            too_long = len(content) > MAX_LINE_BYTES
            yield line + text.count(b"\n", 0, lead), start + lead, None if too_long else content
        elif number or end != b"]":  # `[]` is an array, `[1,]` and `[,1]` are none
            what = "is not valid JSON: an element is missing"
            raise BadFile(what, "write one", line=line, byte=start)
        number += 1
    window.refuse_more()


class _Window:
    """What is held of the stream: `buffer` begins at byte `base`; `at` is the next byte in it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.buffer = stream, b""
        self.base, self.at, self.line = 0, 0, 1  # `line` is that of `at`
        self.too_long: tuple[int, int] | None = None  # where the element in work starts, if it is

    def find(self, mark: bytes) -> None:
        """Go behind the first `mark`."""
        while mark not in self.buffer:
            self._more()
        self._go_to(self.buffer.index(mark) + 1)

    def element(self) -> tuple[int, int, bytes | None, bytes]:
        """(line and byte where it starts, its text, the `,` or `]` behind it).

        The text is null where it is too long.
        """
        depth, position = 0, self.at
        while True:
            token = _TOKEN.search(self.buffer, position)
            if self.too_long:  # it is never parsed, and a quote that is not closed goes on for long
                end = token.start() if token else len(self.buffer)
                if not _BETWEEN.fullmatch(self.buffer, position, end):
                    raise self._fault("is not valid JSON", _CLOSE)
            if token is None or token.group() == b'"':
                position = self._read_on(token.start() if token else None)
                continue
            position = token.end()
            if depth == 0 and token.group() in (b",", b"]"):
                start = self.too_long or (self.line, self.base + self.at)
                text = None if self.too_long else self.buffer[self.at : token.start()]
                self._go_to(position)
                self.too_long = None
                return *start, text, token.group()
            depth += _LEVELS.get(token.group(), 0)
            if depth < 0:
                raise self._fault("is not valid JSON: } without {", "remove it")

    def _read_on(self, quote: int | None) -> int:
        """Read more of an element; the position of what is not seen yet.

        Args:
            quote: position of a string that goes on; null: all in the buffer is seen.
        """
        if self.too_long is None and self._is_too_long():
            self._go_to(self.at + self._blanks())
            self.too_long = self.line, self.base + self.at
        if self.too_long is None:
            unseen = (len(self.buffer) if quote is None else quote) - self.at
            self._more()  # moves the window
            return self.at + unseen
        self._go_to(len(self.buffer) if quote is None else quote + 1)  # what is seen is not held
        while True:
            rest = _STRING.match(self.buffer, self.at) if quote is not None else None
            if rest is not None:
                self._go_to(rest.end())
                if rest.group(1):
                    return self.at
            self._more()
            if rest is None:
                return self.at

    def _is_too_long(self) -> bool:
        """Whether what is held of an element is; blanks around it do not count, up to a point."""
        held = len(self.buffer) - self.at
        if not MAX_LINE_BYTES < held <= 2 * MAX_LINE_BYTES:
            return held > MAX_LINE_BYTES
        return len(self.buffer[self.at :].strip(BLANK)) > MAX_LINE_BYTES

    def refuse_more(self) -> None:
        """Refuse anything but blanks up to the end of the stream."""
        while True:
            rest = self.buffer[self.at :].lstrip(BLANK)
            if rest:
                self._go_to(len(self.buffer) - len(rest))
                raise self._fault("is not valid JSON: something follows the array", "remove it")
            self._go_to(len(self.buffer))
            self.base, self.at = self.base + self.at, 0
            self.buffer = self.stream.read(_BLOCK_BYTES)
            if not self.buffer:
                return

    def _more(self) -> None:
        block = self.stream.read(_BLOCK_BYTES)
        if not block:
            what = "is not valid JSON: the file ends inside the array"
            raise self._fault(what, f"get the whole file, or {_CLOSE}")
        self.buffer = self.buffer[self.at :] + block
        self.base, self.at = self.base + self.at, 0

    def _blanks(self) -> int:
        """How many blanks stand at `at`, where something follows them."""
        rest = len(self.buffer[self.at :].lstrip(BLANK))
        return len(self.buffer) - self.at - rest if rest else 0

    def _fault(self, what: str, fix: str) -> BadFile:
        if self.too_long is None:
            self._go_to(self.at + self._blanks())
        line, byte = self.too_long or (self.line, self.base + self.at)
        return BadFile(what, fix, line=line, byte=byte)

    def _go_to(self, position: int) -> None:
        self.line += self.buffer.count(b"\n", self.at, position)
        self.at = position
