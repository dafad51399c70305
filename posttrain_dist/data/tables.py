"""Rows of tables: CSV, parquet, and Hugging Face datasets. Located as the lines of JSON are.

In a table an empty cell and an absent key are the same, so nulls are left out, and what JSON
would nest may stand as JSON text in a cell.
"""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from posttrain_dist.data.bad_row import BadFile, BadRow
from posttrain_dist.data.json_lines import BOM, MAX_LINE_BYTES, load
from posttrain_dist.errors import DataError

_BATCH_BYTES = 4 << 20  # of a parquet file, decoded at a time
_BATCH_ROWS = 1024
HF = "hf:"  # hf:<owner>/<name>[:<split>], or hf:<folder>[:<split>]

Cell = tuple[int, int | None, dict[str, Any] | BadRow]  # row or line, byte, what stands there
NESTED = ("messages", "conversations", "tools", "history", "input_ids", "labels", "attention_mask")
MAYBE_NESTED = ("prompt", "completion", "chosen", "rejected")


def unpack_cells(row: dict[str, Any]) -> dict[str, Any]:
    """Read the JSON in those cells that hold lists; the names are ours.

    Raises:
        BadRow: such a cell is not valid JSON.
    """
    for name in NESTED:
        if isinstance(row.get(name), str):
            try:
                row[name] = load(row[name].encode())
            except BadRow as error:
                raise BadRow(
                    f"{name} {error.what}", "write a JSON list in this cell", field=name
                ) from error
    for name in MAYBE_NESTED:
        value = row.get(name)
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            try:
                row[name] = load(value.encode())
            except BadRow:
                continue  # text that looks like a list
    return row


# ------------------------------------------------------------------------------------- CSV


def read_csv(stream: IO[bytes]) -> Iterator[Cell]:
    """The rows of a CSV file with a header; the stream stands at its start.

    Raises:
        BadFile: from here on the file cannot be read.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # an open quote would swallow the rest of the file
    lines = _CsvLines(stream)
    rows = csv.reader(lines, strict=True)
    header: list[str] = []
    while True:
        line, byte = rows.line_num + 1, lines.byte
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            fix = "save it with commas between cells and quotes around cells with commas"
            raise BadFile(f"is not valid CSV: {error}", fix, line=line, byte=byte) from error
        except UnicodeDecodeError as error:
            what = f"is not valid UTF-8: {error.reason}"
            at = lines.byte + error.start
            fix = "save the file as UTF-8"
            raise BadFile(what, fix, line=lines.line, byte=at) from error
        if not header:
            header = _header(cells) if any(cells) else []
        elif len(cells) != len(header) and any(cells):
            what = f"has {len(cells)} cells, and the header has {len(header)}"
            yield line, byte, BadRow(what, "write a cell for each name of the header")
        elif any(cells):
            yield line, byte, {name: c for name, c in zip(header, cells, strict=True) if name and c}


class _CsvLines:
    """Lines cut at LF only, as text; knows where the next one starts."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.byte, self.line = stream, 0, 1

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        raw = self.stream.readline(MAX_LINE_BYTES + 2)
        if not raw:
            raise StopIteration
        text = raw.removeprefix(BOM).decode() if self.byte == 0 else raw.decode()
        self.byte += len(raw)
        self.line += 1
        return text


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
        about = table.metadata
        groups = list(range(about.num_row_groups)) if groups is None else groups
        parts = [about.row_group(group) for group in groups]
        widest = max([1.0, *(part.total_byte_size / (part.num_rows or 1) for part in parts)])
        rows = max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / widest)))
        yield from _numbered(table.iter_batches(rows, row_groups=groups), first)


def _open_parquet(file: str) -> Any:
    from pyarrow import parquet  # type: ignore[import-untyped]

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
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except (UnicodeDecodeError, ValueError, OverflowError):
            rows = [_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
        yield from ((n, None, _without_nulls(row)) for row, n in zip(rows, numbers, strict=False))


def _row(one: Any) -> Any:
    try:
        return one.to_pylist()[0]
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        return BadRow(f"has a value that cannot be read: {error}", "write it as UTF-8 text")


def _without_nulls(value: Any) -> Any:
    """Keys of a struct that another row needs come as nulls; NaN is how pandas says null."""
    if isinstance(value, dict):
        kept = ((key, item) for key, item in value.items() if item is not None and item == item)
        return {key: _without_nulls(item) for key, item in kept}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_without_nulls(item) for item in value]
    return value


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
        for at in range(start, end, 256):
            table = arrow[at : min(end, at + 256)]
            yield from _numbered(iter([table]), at + 1)
