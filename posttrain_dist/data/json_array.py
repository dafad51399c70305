"""A JSON file that is one array: its elements, found without reading the whole file at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

from posttrain_dist.data.bad_row import BadFile
from posttrain_dist.data.json_lines import BLANK, BOM, MAX_LINE_BYTES, SPLIT_IT, TOO_LONG, Line

_BLOCK_BYTES = 1 << 20
# A whole string, or a character that opens, closes or parts; a quote alone: the string goes on.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|["\[\]{},]', re.DOTALL)
_LEVELS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


def is_array(stream: IO[bytes]) -> bool:
    """Whether the first character is `[`; reads from the start of the stream."""
    return stream.read(1 << 16).removeprefix(BOM).lstrip(BLANK).startswith(b"[")


def read_elements(stream: IO[bytes]) -> Iterator[Line]:
    """(line, byte, text) of each element, unparsed; the stream stands at its start.

    Raises:
        BadFile: the array does not end, an element is missing or too long, or something follows
            the array.
    """
    window = _Window(stream)
    window.find(b"[")
    number, end = 0, b","
    while end != b"]":
        line, start, text, end = window.element()
        content = text.lstrip(BLANK)
        lead = text[: len(text) - len(content)]
        if content:
            yield line + lead.count(b"\n"), start + len(lead), content.rstrip(BLANK)
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

    def find(self, mark: bytes) -> None:
        """Go behind the first `mark`."""
        while mark not in self.buffer:
            self._more()
        self._go_to(self.buffer.index(mark) + 1)

    def element(self) -> tuple[int, int, bytes, bytes]:
        """(line and byte where it starts, its text, the `,` or `]` behind it)."""
        depth, position = 0, self.at
        while True:
            token = _TOKEN.search(self.buffer, position)
            if token is None or token.group() == b'"':
                unread = (token.start() if token else len(self.buffer)) - self.at
                self._more()  # moves the window
                position = self.at + unread
                continue
            position = token.end()
            if depth == 0 and token.group() in (b",", b"]"):
                text = self.buffer[self.at : token.start()]
                found = self.line, self.base + self.at, text, token.group()
                self._go_to(position)
                return found
            depth += _LEVELS.get(token.group(), 0)
            if depth < 0:
                raise self._fault("is not valid JSON: } without {", "mend it")

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
        held = len(self.buffer) - self.at
        if held > MAX_LINE_BYTES:
            fix = f"{SPLIT_IT}, or look for a quote that is not closed"
            raise self._fault(TOO_LONG, fix)
        block = self.stream.read(_BLOCK_BYTES)
        if not block:
            what = "is not valid JSON: the file ends inside the array"
            raise self._fault(what, "get the whole file")
        self.buffer = self.buffer[self.at :] + block
        self.base, self.at = self.base + self.at, 0

    def _fault(self, what: str, fix: str) -> BadFile:
        lead = len(self.buffer) - self.at - len(self.buffer[self.at :].lstrip(BLANK))
        if self.at + lead < len(self.buffer):
            self._go_to(self.at + lead)
        return BadFile(what, fix, line=self.line, byte=self.base + self.at)

    def _go_to(self, position: int) -> None:
        self.line += self.buffer.count(b"\n", self.at, position)
        self.at = position
