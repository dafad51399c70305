"""A file without rows is nothing among files that hold some, as Spark writes them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from posttrain_dist.data import Format
from posttrain_dist.data.formats.records import Reader, Rejected

ROW = b'{"text":"a"}\n'
EMPTY = {
    "0.jsonl": b"",
    "1.jsonl": b"\xef\xbb\xbf\n \n",
    "2.jsonl.gz": gzip.compress(b""),
    "3.jsonl.zst": b"",
    "4.json": b"[ ]",
    "5.csv": b"text\n",
    "6.csv": b"",
}


def write(folder: Path, files: dict[str, bytes]) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    for name, content in files.items():
        (folder / name).write_bytes(content)
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "7.parquet")
    return str(folder)


@pytest.mark.parametrize("name", ["!first.jsonl", "5a.jsonl", "last.jsonl"])
@pytest.mark.parametrize("unit_bytes", [None, 1])
def test_an_empty_file_beside_rows(tmp_path: Path, name: str, unit_bytes: int | None) -> None:
    path = write(tmp_path, EMPTY | {name: ROW})
    for reader in (Reader(path, format=Format.text), Reader(path, accepts={Format.text})):
        rows = [row for unit in reader.units(unit_bytes) for row in reader.read(unit)]
        assert [getattr(row, "where", row) for row in rows] == [f"{tmp_path}/{name}:1"]
        assert list(reader) == rows


def test_a_file_with_nothing_but_bad_rows_is_not_empty(tmp_path: Path) -> None:
    path = write(tmp_path, {"0.jsonl": b"", "1.jsonl": b"{\n"})
    (bad,) = Reader(path, format=Format.text)
    assert isinstance(bad, Rejected) and (bad.file, bad.line) == (f"{tmp_path}/1.jsonl", 1)


@pytest.mark.parametrize("unit_bytes", [None, 1])
def test_where_all_are_empty_each_is_rejected(tmp_path: Path, unit_bytes: int | None) -> None:
    reader = Reader(write(tmp_path, EMPTY), format=Format.text)
    rows = [row for unit in reader.units(unit_bytes) for row in reader.read(unit)]
    rejected = [
        (Path(row.file).name, row.what, row.ends_file) for row in rows if isinstance(row, Rejected)
    ]
    assert rejected == [(name, "holds no row", True) for name in (*EMPTY, "7.parquet")]
