"""Rows to Records: every format from every container, row by row, each fault with its place.

    {"messages": [{"role": "user", "content": "..."}, ...], "task_type": "...", "check": "exact"}
    {"text": "...", "task_type": "..."}

and the others of docs/data.md. A reader never holds more than a few rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from posttrain_dist.data import Format
from posttrain_dist.data.formats.recognise import (
    check_columns,
    or_other,
    recognise,
    rename,
    to_record,
)
from posttrain_dist.data.formats.shapes import FORMATS
from posttrain_dist.data.read import containers, tables
from posttrain_dist.data.read.bad_row import BadFile, BadRow, Rejected, errors_by_cause
from posttrain_dist.data.read.containers import Unit, find_files
from posttrain_dist.errors import ConfigError, raise_all
from posttrain_dist.flow import Record

__all__ = ["MAX_ERRORS", "Reader", "Rejected", "Unit", "find_files", "read_records"]

MAX_ERRORS = 20  # reading stops after so many; they are reported together
_FIRST_ROWS = 100  # looked at to recognise the format
ALL_FORMATS = frozenset(FORMATS)


class Reader:
    """The rows of a path as Records; it can be read again, and sent to other processes.

    Args:
        path: a file, folder or glob, or hf:<owner>/<name>[:<split>].
        format: how rows are written; `auto` recognises it from the first rows.
        columns: our name of a key -> the name in the files.
        accepts: formats that the objective can train on.

    Raises:
        DataError: there is no such file, or no accepted format fits the first rows.
        ConfigError: the format is not accepted, two fit, or `columns` has an unknown name.
    """

    def __init__(
        self,
        path: str,
        *,
        format: Format = Format.auto,
        columns: Mapping[str, str] | None = None,
        accepts: Set[Format] = ALL_FORMATS,
    ) -> None:
        self.path, self.columns = path, dict(columns or {})
        self.recognised = format is Format.auto  # by its rows, so that it should be logged
        check_columns(self.columns)
        if self.recognised:
            format = self._recognise(accepts)
        elif format not in accepts:
            names = ", ".join(f.name for f in FORMATS if f in accepts)
            what = f"is {format.name}, and this objective reads {names}"
            raise ConfigError(
                what, where="data.format", fix=f"use one of {names}{or_other(format, accepts)}"
            )
        self.format = format

    def __iter__(self) -> Iterator[Record | Rejected]:
        for unit in self.units():
            yield from self.read(unit)

    def units(self, unit_bytes: int | None = None) -> Iterator[Unit]:
        """Parts that several processes can read; all in their order give what `iter` gives.

        Args:
            unit_bytes: about so many bytes of JSON lines per unit; null: one unit per file.

        Raises:
            DataError: there is no such file.
        """
        return containers.find_units(self.path, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Record | Rejected]:
        """The rows of one unit."""
        stem = unit.stem
        for line, byte, value in _rows(unit):
            if isinstance(value, Rejected):
                yield value
                continue
            try:
                row = self._named(value, unit)
                yield to_record(self.format, row, stem, f"{unit.file}:{line}", self.columns)
            except BadRow as error:
                yield _rejected(error, unit.file, line, byte)

    def _named(self, value: Any, unit: Unit) -> Any:
        """The row under our names.

        Raises:
            BadRow: it could not be read.
        """
        if isinstance(value, BadRow):
            raise value
        row = rename(value, self.columns)
        return tables.unpack_cells(row) if unit.is_table and isinstance(row, dict) else row

    def _recognise(self, accepts: Set[Format]) -> Format:
        rows: list[frozenset[str]] = []  # their keys: a hundred whole rows may be large
        seen = 0
        where = self.path
        for unit in self.units():
            for line, _, value in _rows(unit):
                seen += 1
                if isinstance(value, dict):
                    where = where if rows else f"{unit.file}:{line}"
                    rows.append(frozenset(rename(value, self.columns)))
                if rows and seen >= _FIRST_ROWS:
                    return recognise(rows, accepts, where)
        return recognise(rows, accepts, where)


def _rows(unit: Unit) -> Iterator[tuple[int, int | None, Any]]:
    """(line, byte, value); the value is a BadRow, or a Rejected where the file cannot go on."""
    try:
        yield from containers.read_unit(unit)
    except BadFile as error:
        what, fix = error.what, error.fix
        end = Rejected(unit.file, error.line, error.byte, "", what, fix, ends_file=True)
        yield error.line, error.byte, end


def _rejected(error: BadRow, file: str, line: int, byte: int | None) -> Rejected:
    place = None if byte is None else byte + error.at
    return Rejected(file, line, place, error.field, error.what, error.fix)


def read_records(path: str, rows: str) -> list[Record]:
    """Every row of a path as a list, for data that is small.

    Args:
        path: file, folder or glob.
        rows: the name of the format.

    Raises:
        DataError, SeveralErrors: up to 20 faults, each with file:line, byte and field.
    """
    records: list[Record] = []
    rejected: list[Rejected] = []
    complete = True
    for row in Reader(path, format=Format[rows]):
        if len(rejected) >= MAX_ERRORS:
            complete = False
            break
        if isinstance(row, Record):
            records.append(row)
        else:
            rejected.append(row)
    raise_all(errors_by_cause(rejected, complete=complete))
    return records
