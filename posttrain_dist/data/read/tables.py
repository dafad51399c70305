"""Rows of tables: CSV, parquet, and Hugging Face datasets. Located as the lines of JSON are.

In a table an empty cell and an absent key are the same, so nulls are left out, and what JSON
would nest may stand as JSON text in a cell.
"""

from __future__ import annotations

import csv
import functools
import itertools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from posttrain_dist.data.read.bad_row import BadFile, BadRow
from posttrain_dist.data.read.json_cells import JsonCell, row_reader
from posttrain_dist.data.read.json_lines import BOM, MAX_LINE_BYTES, SPLIT_IT, TOO_LONG, load
from posttrain_dist.errors import DataError

_BATCH_BYTES = 1 << 20  # of arrow, decoded and made Python at a time
_BATCH_ROWS = 64  # at most so many at a time, as nobody knows how wide the next ones are
_FIRST_ROWS = 4
_BLOCK_BYTES = 1 << 20
_QUOTE = re.compile(rb'"|(?<=")[^",\r\n]')  # or what may not follow the end of a quoted cell
_CSV = "is not valid CSV:"
_CLOSE = "look for a quote that is not closed: the row is longer than any that is read"
HF = "hf:"  # hf:<owner>/<name>[:<split>], or hf:<folder>[:<split>]

Cell = tuple[int, int | None, dict[str, Any] | BadRow]  # row or line, byte, what stands there
NESTED = (
    *("messages", "conversations", "tools", "history", "answers", "ranks", "scores"),
    *("input_ids", "labels", "attention_mask"),
)
MAYBE_NESTED = ("prompt", "completion", "chosen", "rejected")
_TURNS = ("messages", "conversations", *MAYBE_NESTED)
_LIST_OF_OBJECTS = re.compile(r"""\s*\[\s*\{\s*["'}]""")  # as JSON and Python write its beginning
_AS_JSON = "write JSON in this cell (json.dumps, not str), or use parquet or JSONL"


def unpack_cells(row: dict[str, Any]) -> dict[str, Any]:
    """Read the JSON in those cells that hold it, or lists; the names are ours.

    Raises:
        BadRow: such a cell is not valid JSON.
    """
    typed = {name: cell.read(name) for name, cell in row.items() if isinstance(cell, JsonCell)}
    row |= typed
    for name in NESTED:
        if isinstance(row.get(name), str):
            row[name] = _load_cell(row[name], name, name)
    for name in MAYBE_NESTED:
        value = row.get(name)
        if isinstance(value, str) and name not in typed and _LIST_OF_OBJECTS.match(value):
            # Such as what pandas makes of a list of turns.
            row[name] = _load_cell(value, name, f"{name} begins like a list of turns, and")
    for name in _TURNS:
        turns = row.get(name)
        if isinstance(turns, list) and any(isinstance(turn, str) for turn in turns):
            row[name] = [_turn(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]
    return row


def _load_cell(text: str, name: str, what: str) -> Any:
    try:
        return load(text.encode())
    except BadRow as error:
        raise BadRow(f"{what} {error.what}", _AS_JSON, field=name) from error


def _turn(turn: Any, path: str) -> Any:
    """A turn, where it is the text of an object: some tools lose the type of such a column."""
    is_object = isinstance(turn, str) and turn.lstrip().startswith("{")
    return _load_cell(turn, path, path) if is_object else turn


# ------------------------------------------------------------------------------------- CSV


def read_csv(stream: IO[bytes]) -> Iterator[Cell]:
    """The rows of a CSV file with a header; the stream stands at its start.

    Raises:
        BadFile: from here on the file cannot be read.
    """
    csv.field_size_limit(2 * MAX_LINE_BYTES)  # rows have a limit of their own
    lines = _CsvLines(stream)
    rows = csv.reader(lines, strict=True)
    header: list[str] = []
    while True:
        line, byte = lines.begin_row()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            fix = "save it with commas between cells and quotes around cells with commas"
            raise BadFile(f"{_CSV} {error}", fix, line=line, byte=byte) from error
        fault = lines.fault
        if fault is not None and not header:
            raise BadFile(fault.what, fault.fix, line=line, byte=byte + fault.at)
        if fault is not None:
            yield line, byte, fault
        elif not header:
            header = _header(cells) if any(cells) else []
        elif len(cells) != len(header) and any(cells):
            what = f"has {len(cells)} cells, and the header has {len(header)}"
            yield line, byte, BadRow(what, "write a cell for each name of the header")
        elif any(cells):
            yield line, byte, {name: c for name, c in zip(header, cells, strict=True) if name and c}


class _CsvLines:
    """Lines cut at LF only, as text; knows where they start and what is wrong with their row.

    A row with a fault still comes to its end, so that the next one can be read: bytes that are no
    UTF-8 come as half surrogate pairs, and of a row that is too long only the beginning comes.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.byte, self.line = stream, 0, 1
        self.fault: BadRow | None = None  # of the row in work, the first one
        self._row, self._row_line = 0, 1  # byte and line where it starts

    def __iter__(self) -> _CsvLines:
        return self

    def begin_row(self) -> tuple[int, int]:
        """(line, byte) where the next row starts."""
        self._row, self._row_line, self.fault = self.byte, self.line, None
        return self._row_line, self._row

    def __next__(self) -> str:
        raw = self.stream.readline(MAX_LINE_BYTES + 2)
        if not raw:
            raise StopIteration
        mark = len(BOM) if self.byte == 0 and raw.startswith(BOM) else 0
        before = self.byte - self._row  # of the row; it goes on, so a quoted cell is open
        most = MAX_LINE_BYTES - before
        if len(raw) > most and len(raw.rstrip(b"\r\n")) > most:
            self.fault = BadRow(TOO_LONG, SPLIT_IT)
            self.byte += mark
            self._skip_row(raw[mark:], quoted=before > 0)
            return '"\n' if before else "\n"
        try:
            text = raw[mark:].decode()
        except UnicodeDecodeError as error:
            text = raw[mark:].decode(errors="surrogateescape")
            what = f"is not valid UTF-8: {error.reason}"
            at = before + mark + error.start
            self.fault = self.fault or BadRow(what, "save the file as UTF-8", at=at)
        self.byte += len(raw)
        self.line += 1
        return text

    def _skip_row(self, piece: bytes, quoted: bool) -> None:
        """Go behind a row of which `piece` was read; `quoted`: it stands inside a quoted cell."""
        line, byte = self._row_line, self._row
        last, closed = b"\n", 0  # the byte before the piece; where the last quoted cell has ended
        while piece:
            text = last + piece
            for mark in _QUOTE.finditer(text, 1):
                at = mark.start()
                if mark.group() == b'"':
                    opens = closed == at or text[at - 1 : at] in (b",", b"\n")
                    closed, quoted = (at + 1, False) if quoted else (closed, opens)
                elif closed == at and not quoted:
                    raise BadFile(f"{_CSV} ',' expected after '\"'", _CLOSE, line=line, byte=byte)
            self.byte += len(piece)
            ended = piece.endswith(b"\n")
            self.line += ended
            if ended and not quoted:
                return
            last, closed = text[-1:], closed - len(text) + 1
            piece = self.stream.readline(_BLOCK_BYTES)
        if quoted:
            raise BadFile(f"{_CSV} unexpected end of data", _CLOSE, line=line, byte=byte)


def _header(names: list[str]) -> list[str]:
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise BadFile(f"column {twice!r} stands twice in the header", "rename one", line=1)
    return names


# ------------------------------------------------------------------------------- parquet


def parquet_groups(file: str) -> list[int]:
    """Rows of each row group.

    Raises:
        BadFile: it is no parquet file.
    """
    with _arrow_faults(), _open_parquet(file) as table:
        about = table.metadata
        return [about.row_group(i).num_rows for i in range(about.num_row_groups)]


def read_parquet(file: str, groups: list[int] | None, first: int) -> Iterator[Cell]:
    """The rows of some row groups (null: all); `first` is the number of the first row.

    Raises:
        BadFile: it cannot be read on.
    """
    with _arrow_faults(), _open_parquet(file) as table:
        groups = list(range(table.num_row_groups)) if groups is None else groups
        yield from _numbered(_parquet_batches(table, groups), first)


def _parquet_batches(table: Any, groups: list[int]) -> Iterator[Any]:
    """Small batches: their encoded size in the file says little about what they take."""
    for batch in table.iter_batches(_FIRST_ROWS, row_groups=groups):
        yield batch
        table.reader.set_batch_size(_fitting(batch))  # counts from the next batch on


def _fitting(batch: Any) -> int:
    """How many rows to read after these."""
    rows: int = max(1, batch.num_rows)
    fitting: int = rows * _BATCH_BYTES // _decoded_bytes(batch)
    return max(1, min(_BATCH_ROWS, 4 * rows, fitting))


def _decoded_bytes(batch: Any) -> int:
    """At most so many; of a dictionary the values may stand in each row."""
    from pyarrow import types  # type: ignore[import-untyped]

    words = [column.dictionary for column in batch.columns if types.is_dictionary(column.type)]
    size: int = batch.nbytes + batch.num_rows * sum(each.nbytes for each in words)
    return max(1, size)


def _open_parquet(file: str) -> Any:
    from pyarrow import parquet

    # Whole column chunks would be read ahead otherwise.
    return parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)


@contextmanager
def _arrow_faults() -> Iterator[None]:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise BadFile("needs the package pyarrow", "pip install pyarrow", byte=None) from error
    try:
        yield
    except Exception as error:  # of every kind, where the footer of a file is damaged
        reason = str(error).partition("\n")[0].rstrip(". ")
        fix = "write the file again, or get it whole"
        raise BadFile(f"cannot be read: {reason}", fix, byte=None) from error


def _numbered(batches: Iterator[Any], first: int) -> Iterator[Cell]:
    numbers = itertools.count(first)
    read_json, schema = None, None
    for batch in batches:
        if batch.schema != schema:
            schema = batch.schema
            read_json = row_reader(schema)
        size = _decoded_bytes(batch)
        step = max(1, batch.num_rows * _BATCH_BYTES // size)
        for at in range(0, batch.num_rows, step):
            part = batch.slice(at, step)
            try:
                rows = part.to_pylist()
            except (UnicodeDecodeError, ValueError, OverflowError):
                rows = [_row(part.slice(i, 1)) for i in range(part.num_rows)]
            for row, number in zip(rows, numbers, strict=False):
                too_long = size > MAX_LINE_BYTES and _is_too_long(row)
                value = BadRow(TOO_LONG, SPLIT_IT) if too_long else _without_nulls(row)
                yield number, None, value if read_json is None else read_json(value)


def _is_too_long(row: Any) -> bool:
    """Whether its texts and numbers take more than a line of JSON may."""
    size, waiting = 0, [row]
    while waiting and size <= MAX_LINE_BYTES:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            size += len(value.encode())
        else:
            size += len(value) if isinstance(value, bytes) else 1
    return size > MAX_LINE_BYTES


def _row(one: Any) -> Any:
    try:
        return one.to_pylist()[0]
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        return BadRow(f"has a value that cannot be read: {error}", "write it as UTF-8 text")


def _without_nulls(value: Any) -> Any:
    """Keys of a struct that another row needs come as nulls; NaN is how pandas says null.

    Of the arguments of a call they stay, as NaN, which no JSON holds: the call's tool says
    which of them are its own.
    """
    if isinstance(value, dict):
        kept = ((key, item) for key, item in value.items() if item is not None and item == item)
        return {
            key: _with_nan(item)
            if key == "arguments" and isinstance(item, dict)
            else _without_nulls(item)
            for key, item in kept
        }
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_without_nulls(item) for item in value]
    return value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        kept = ((key, _with_nan(item)) for key, item in value.items())
        return {key: math.nan if item is None else item for key, item in kept}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return value if value == value else None


# ------------------------------------------------------------------- Hugging Face datasets


@functools.lru_cache(maxsize=4)
def load_hf(name: str) -> Any:
    """The dataset that `hf:<name>[:<split>]` means; mapped from disk, not held.

    Raises:
        DataError: the package is missing, or it cannot load the dataset.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "needs the package datasets",
            where=name,
            fix="pip install datasets, or give files of rows",
        ) from error
    place, _, split = name.removeprefix(HF).partition(":")
    split = split or "train"
    folder = Path(place).expanduser()
    saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if saved and ("[" in split or "+" in split):
        raise DataError(
            f"a dataset that save_to_disk wrote has no slice {split!r}",
            where=name,
            fix="leave the slice out, or save the part of it by itself with .select(...)",
        )
    try:
        loaded = (
            datasets.load_from_disk(str(folder))
            if saved
            else datasets.load_dataset(str(folder) if folder.is_dir() else place, split=split)
        )
        return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    except Exception as error:  # of many libraries below
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise DataError(
            f"cannot be loaded: {reason}",
            where=name,
            fix="write hf:<owner>/<name>:<split>, and download it first where there is no network",
        ) from error


def read_hf(dataset: Any, start: int, end: int) -> Iterator[Cell]:
    """Rows [start, end) of a dataset; numbers count from 1."""
    arrow = dataset.with_format("arrow")
    with _arrow_faults():
        yield from _numbered(_hf_batches(arrow, start, end), start + 1)


def _hf_batches(arrow: Any, start: int, end: int) -> Iterator[Any]:
    rows = _FIRST_ROWS
    while start < end:
        stop = min(end, start + rows)
        for batch in arrow[start:stop].to_batches():
            yield batch
            rows = _fitting(batch)
        start = stop
