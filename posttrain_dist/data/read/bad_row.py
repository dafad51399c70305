"""What is wrong with one row, and where: found by a parser, located by the reader."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain_dist.errors import DataError, PosttrainError

_NUMBER = re.compile(r"\d+")
_QUOTED = re.compile(r"""'[^']*'|"[^"]*\"""")


class BadRow(Exception):
    """A fault inside one row; the reader adds the file and the line.

    Args:
        what: the fault in one sentence, which begins with the path of the field.
        fix: what the user can do about it.
        field: path of the field (`messages[2].content`), empty when it is the row itself.
        at: bytes from the start of the line, where that is known.
    """

    def __init__(self, what: str, fix: str, *, field: str = "", at: int = 0) -> None:
        super().__init__(what)
        self.what, self.fix, self.field, self.at = what, fix, field, at


class BadFile(Exception):
    """From here on a file cannot be read; line 0 is the file as a whole."""

    def __init__(self, what: str, fix: str, *, line: int = 0, byte: int | None = 0) -> None:
        super().__init__(what)
        self.what, self.fix, self.line, self.byte = what, fix, line, byte


def bad_field(field: str, what: str, fix: str) -> BadRow:
    """The fault of one field: `what` goes on after the field's path."""
    return BadRow(f"{field} {what}", fix, field=field)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be used, or what is left of a file that cannot be read on.

    The latter (`ends_file`) is never skipped: nobody knows how many rows are behind it.
    """

    file: str
    line: int  # from 1; of a table the row; 0: the file as a whole
    byte: (
        int | None
    )  # offset in the (uncompressed) file; null where rows have no bytes of their own
    field: str  # path such as messages[2].content, or empty
    what: str
    fix: str
    ends_file: bool = False

    @property
    def cause(self) -> tuple[str, str]:
        """Equal for rows that are wrong in the same way: places and the row's own text apart."""
        what = self.what if self.field else _QUOTED.sub("'...'", self.what)
        return _NUMBER.sub("0", what), _NUMBER.sub("0", self.fix)

    def error(self) -> DataError:
        """The same as an error that can be raised."""
        where = f"{self.file}:{self.line}" if self.line else self.file
        if self.byte is not None and self.line:
            where += f" (byte {self.byte})"
        return DataError(self.what, where=where, fix=self.fix)


def errors_by_cause(rejected: Sequence[Rejected], *, complete: bool) -> list[PosttrainError]:
    """One error for each cause, at the first of its rows: "15 rows, first at line 1: ...".

    Args:
        rejected: the first rows that cannot be used, in order.
        complete: they are all: everything was read.
    """
    causes: dict[tuple[str, str], list[Rejected]] = {}
    for row in rejected:
        causes.setdefault(row.cause, []).append(row)
    more = "" if complete else " or more"
    found: list[PosttrainError] = []
    for rows in causes.values():
        error = rows[0].error()
        if len(rows) > 1:
            what = f"{len(rows)}{more} rows, first at line {rows[0].line}: {error.what}"
            error = DataError(what, where=error.where, fix=error.fix)
        found.append(error)
    return found


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
