"""Files, folders, globs and datasets to located raw rows, in bounded memory.

What a path means is a list of files; a file is read as one or several units, each of which a
process of its own can read. The rows of all units, in their order, are the rows of the path.
"""

from __future__ import annotations

import glob
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

from posttrain_dist.data.read import json_array, tables
from posttrain_dist.data.read.bad_row import BadFile, BadRow
from posttrain_dist.data.read.json_lines import BLANK, BOM, SPLIT_IT, TOO_LONG, load, read_lines
from posttrain_dist.errors import DataError, refuse_undecoded

_PACKED = (".gz", ".zst")
_KINDS = {".jsonl": "lines", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# What datasets.save_to_disk writes beside the rows.
_ABOUT = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
_BLOCK_BYTES = 1 << 20
_HF_ROWS = 10_000  # a unit, by default

Raw = tuple[int, int | None, Any]  # line or row, byte, the JSON value or BadRow


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of one file, in the order of reading; it can be sent to another process."""

    file: str
    kind: str  # lines, json, csv, parquet, hf
    start: int = 0  # byte; row group; row of a dataset
    end: int | None = None  # where the next unit starts; null: the end of the file
    first: int = 1  # number of its first line or row
    may_be_empty: bool = False  # as another file of the path holds rows

    @property
    def is_table(self) -> bool:
        """Whether its rows have cells instead of JSON values."""
        return self.kind in ("csv", "parquet", "hf")

    @property
    def stem(self) -> str:
        """Name of the file without what says how it is packed."""
        if self.kind == "hf":
            return self.file.removeprefix(tables.HF).partition(":")[0].rstrip("/").split("/")[-1]
        path = Path(self.file)
        return Path(path.stem).stem if path.suffix in _PACKED else path.stem


def find_files(path: str) -> list[Path]:
    """The files that a path means, sorted by name; of a dataset those it is mapped from.

    Raises:
        DataError: there are none.
        PosttrainError: the name of one is no UTF-8.
    """
    if path.startswith(tables.HF):
        mapped = tables.load_hf(path).cache_files
        return sorted(Path(file["filename"]) for file in mapped)
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = sorted(p for p in place.iterdir() if p.is_file() and _is_data(p))
        saved = ("dataset_info.json", "dataset_dict.json")
        if not files and any((place / name).is_file() for name in saved):
            raise DataError(
                "is a folder of `datasets`, which is read under another name",
                where=str(place),
                fix=f"write hf:{path}, or hf:{path}:<split>",
            )
        what = f"the folder holds no {', '.join('*' + kind for kind in _KINDS)} file"
    else:
        found = glob.glob(str(place), recursive=True)  # noqa: PTH207 - may be absolute
        files = sorted(Path(name) for name in found if Path(name).is_file())
        what = "no file has this name"
    if not files:
        kinds = "JSONL, JSON, parquet or CSV"
        fix = f"give a {kinds} file (JSONL also .gz or .zst), a folder of such files or a glob"
        raise DataError(what, where=str(path), fix=fix)
    refuse_undecoded(map(str, files))
    return files


def _is_data(path: Path) -> bool:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _PACKED]
    hidden = path.name.startswith(".") or path.name in _ABOUT
    return not hidden and bool(suffixes) and suffixes[-1] in _KINDS


# ------------------------------------------------------------------------------------- units


def find_units(path: str, unit_bytes: int | None = None) -> Iterator[Unit]:
    """The units of a path in order.

    Args:
        path: file, folder, glob or dataset.
        unit_bytes: cut JSON lines into units of about so many bytes (they are read once to
            count lines); parquet by row group, datasets by rows; null: a unit a file.

    Raises:
        DataError: there is no such file.
    """
    if path.startswith(tables.HF):
        rows = len(tables.load_hf(path))
        size = _HF_ROWS if unit_bytes else max(rows, 1)
        for start in range(0, max(rows, 1), size):
            yield Unit(path, "hf", start, min(start + size, rows), start + 1)
        return
    files = [Unit(str(file), _kind_of(file)) for file in find_files(path)]
    may_be_empty = len(files) > 1 and any(map(_holds_rows, files))
    for whole in (replace(file, may_be_empty=may_be_empty) for file in files):
        file = Path(whole.file)
        if unit_bytes is None or file.suffix in _PACKED:
            yield whole
            continue
        try:
            if whole.kind == "lines":
                yield from _cut_lines(whole, unit_bytes)
            elif whole.kind == "parquet":
                yield from _cut_groups(whole)
            else:
                yield whole
        except (OSError, BadFile):
            yield whole  # reading it says what is wrong


def _holds_rows(whole: Unit) -> bool:
    """Whether a row comes, be it a bad one; what cannot be read is not empty."""
    try:
        return next(_read(whole), None) is not None
    except BadFile:
        return True


def _kind_of(file: Path) -> str:
    suffix = Path(file.stem).suffix if file.suffix in _PACKED else file.suffix
    return _KINDS.get(suffix, "lines")


def _cut_lines(whole: Unit, unit_bytes: int) -> Iterator[Unit]:
    """Units that end behind a line end; a file without any row stays whole."""
    units: list[Unit] = []
    start = offset = 0
    first = lines = 1
    blank = True
    with Path(whole.file).open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            blank = blank and not block.removeprefix(BOM).strip(BLANK)
            position = 0
            while (wanted := start + unit_bytes - 1 - offset) < len(block):
                end = block.find(b"\n", max(position, wanted))
                if end < 0:
                    break
                lines += block.count(b"\n", position, end + 1)
                position = end + 1
                units.append(Unit(whole.file, whole.kind, start, offset + position, first))
                start, first = offset + position, lines
            lines += block.count(b"\n", position)
            offset += len(block)
    if start < offset:
        units.append(Unit(whole.file, whole.kind, start, offset, first))
    yield from [whole] if blank else units


def _cut_groups(whole: Unit) -> Iterator[Unit]:
    sizes = tables.parquet_groups(whole.file)
    first = 1
    if not sum(sizes):
        yield whole
        return
    for group, rows in enumerate(sizes):
        yield Unit(whole.file, whole.kind, group, group + 1, first)
        first += rows


# ----------------------------------------------------------------------------------- raw rows


def read_unit(unit: Unit) -> Iterator[Raw]:
    """The rows of a unit: (line, byte, value); the value is a BadRow where it cannot be read.

    Raises:
        BadFile: it cannot be read on.
    """
    number = 0
    for number, byte, value in _read(unit):
        yield number, byte, value
    if not number and unit.end is None and not unit.may_be_empty:
        raise BadFile("holds no row", "fill the file or leave it out", byte=None)


def _read(unit: Unit) -> Iterator[Raw]:
    if unit.kind == "hf":
        end = unit.end or 0
        if not end:
            raise BadFile("holds no row", "take another split", byte=None)
        yield from tables.read_hf(tables.load_hf(unit.file), unit.start, end)
    elif unit.kind == "parquet" and not unit.file.endswith(_PACKED):
        groups = list(range(unit.start, unit.end)) if unit.end is not None else None
        yield from tables.read_parquet(unit.file, groups, unit.first)
    elif unit.kind == "parquet":
        raise BadFile("is a packed parquet file", "unpack it: parquet is packed already")
    elif unit.kind == "csv":
        with _open(unit.file) as stream:
            yield from tables.read_csv(stream)
    else:
        yield from _read_json(unit)


def _read_json(unit: Unit) -> Iterator[Raw]:
    if unit.kind == "json":
        with _open(unit.file) as stream:
            array = json_array.is_array(stream)
        if array:
            with _open(unit.file) as stream:
                for number, byte, text in json_array.read_elements(stream):
                    yield number, byte, _parse(text)
            return
    with _open(unit.file) as stream:
        if unit.start:
            stream.seek(unit.start)
        lines = read_lines(stream, number=unit.first, start=unit.start, end=unit.end)
        for number, byte, line in lines:
            value = _parse(line)
            del line  # a long one is not held while the next one is read
            yield number, byte, value


def _parse(text: bytes | None) -> Any:
    if text is None:
        return BadRow(TOO_LONG, SPLIT_IT)
    try:
        return load(text)
    except BadRow as error:
        return error


# --------------------------------------------------------------------------------- containers


class _Counted(io.RawIOBase):
    """A stream that knows how many bytes and lines it gave, for faults of what is below it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.given, self.lines = stream, 0, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer and count."""
        block = self.stream.read1(len(buffer))  # `read` would lose what it has when it fails
        buffer[: len(block)] = block
        self.given += len(block)
        self.lines += block.count(b"\n")
        return len(block)


@contextmanager
def _open(file: str) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file; any fault of the file or its packing is a BadFile."""
    counted: _Counted | None = None
    try:
        with _unpacked(file) as stream:
            if not file.endswith(_PACKED):
                yield cast(IO[bytes], stream)
                return
            counted = _Counted(stream)
            yield cast(IO[bytes], io.BufferedReader(counted, _BLOCK_BYTES))
    except (OSError, EOFError, zlib.error) as error:
        if counted is None:
            what = f"cannot be read: {getattr(error, 'strerror', None) or error}"
            raise BadFile(what, "check its permissions", byte=None) from error
        what = f"cannot be unpacked: {error}"
        fix = "get the whole file; up to here it is good"
        raise BadFile(what, fix, line=counted.lines + 1, byte=counted.given) from error


def _unpacked(file: str) -> Any:
    if file.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.endswith(".zst"):
        try:
            import pyarrow  # type: ignore[import-untyped]
        except ImportError as error:
            raise BadFile("needs the package pyarrow", "pip install pyarrow", byte=None) from error
        return pyarrow.input_stream(file, compression="zstd")
    return Path(file).open("rb", buffering=_BLOCK_BYTES)
