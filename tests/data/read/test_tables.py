"""Rows of tables that are too long, in another encoding, or hold lists written in another way."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain_dist.data import Format
from posttrain_dist.data.formats.records import Reader, Rejected
from posttrain_dist.data.read import tables
from posttrain_dist.data.read.bad_row import BadFile, BadRow
from posttrain_dist.data.read.json_lines import MAX_LINE_BYTES
from posttrain_dist.flow import Record

BOM = b"\xef\xbb\xbf"
MIB = 1 << 20
USER = [{"role": "user", "content": "q"}]
ANSWER = [{"role": "assistant", "content": "a"}]


def read(path: Path, content: bytes, format: Format) -> list[Record | Rejected]:
    path.write_bytes(content)
    return list(Reader(str(path), format=format))


def places(rows: list[Record | Rejected]) -> list[tuple[int, bool]]:
    """(line, whether it was read)."""
    return [
        (r.line, False) if isinstance(r, Rejected) else (int(r.where.rsplit(":")[-1]), True)
        for r in rows
    ]


# ------------------------------------------------------------------------------------- CSV


def test_a_long_csv_row_is_rejected_whole(tmp_path: Path) -> None:
    cells = b"x" * (5 * MIB), b"y" * (5 * MIB)
    for row, lines in (
        (b"%b,%b" % cells, 1),
        (b'"%b","%b"' % cells, 1),
        (b'"%b\n","%b"' % cells, 2),  # each of its lines is short enough
        (b'"%b","%b\n\n"' % cells, 3),
    ):
        content = b"prompt,completion\n" + row + b"\np,c\n"
        rows = read(tmp_path / "a.csv", content, Format.prompt_completion)
        assert places(rows) == [(2, False), (2 + lines, True)]
        bad, good = rows
        assert isinstance(bad, Rejected) and isinstance(good, Record)
        assert (bad.byte, bad.ends_file) == (18, False) and "longer than 8 MiB" in bad.what
        assert good.text == "pc"


def test_the_longest_csv_row_is_read(tmp_path: Path) -> None:
    longest = b"x" * MAX_LINE_BYTES
    rows = read(tmp_path / "a.csv", b"text\r\n" + longest + b"\r\n" + longest + b"x", Format.text)
    assert places(rows) == [(2, True), (3, False)]


def test_a_quote_that_is_not_closed_ends_the_file(tmp_path: Path) -> None:
    tail = b"\n".join([b"x" * 999] * 9000)
    for broken, part in (
        (b'"a\n' + tail, "unexpected end"),
        (b'"a\n' + tail + b'\n"b', "expected"),
    ):
        *before, last = read(tmp_path / "a.csv", b"text\nb\n" + broken + b"\n", Format.text)
        assert isinstance(last, Rejected) and places(before) == [(2, True)]
        assert (last.line, last.byte, last.ends_file) == (3, 7, True)
        assert part in last.what and "quote" in last.fix


CELLS = st.text(alphabet='xyé",\n\r', max_size=30)
RAW = [
    b'x"y"",z',
    b'"",""',
    b'x""y,"z"',
    b'"a""b","c,d"',
    b'"\n""","\n"',
]  # csv.writer writes others


@settings(max_examples=300, deadline=None, database=None, derandomize=True,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.lists(st.tuples(CELLS, CELLS, st.booleans(), st.booleans()), max_size=8), st.data())
def test_rows_of_any_length_are_found_where_they_stand(
    monkeypatch: pytest.MonkeyPatch, drawn: list[Any], data: st.DataObject
) -> None:
    """What is expected is what csv.writer was given, and how long what it wrote is."""
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 24)
    monkeypatch.setattr(tables, "_BLOCK_BYTES", data.draw(st.integers(1, 9)))
    content, wanted = BOM + b"a,b\n", []
    for left, right, quoted, raw in drawn:
        buffer = io.StringIO()
        how = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
        csv.writer(buffer, quoting=how).writerow([left, right])
        row = b",".join([data.draw(st.sampled_from(RAW))] * (9 if quoted else 1)) if raw else None
        written = buffer.getvalue()[:-2].encode() if row is None else row
        place = content.count(b"\n") + 1, len(content)
        if len(written) > 24:
            wanted.append((*place, "too long"))
        elif row is None and left + right:
            cells = {"a": left, "b": right}
            wanted.append((*place, {name: cell for name, cell in cells.items() if cell}))
        elif row is not None and any(
            cells := next(csv.reader(row.decode().splitlines(keepends=True)))
        ):
            wanted.append((*place, {n: c for n, c in zip("ab", cells, strict=True) if c}))
        content += written + data.draw(st.sampled_from([b"\n", b"\r\n"]))
    found = [
        (line, byte, "too long" if isinstance(cells, BadRow) else cells)
        for line, byte, cells in tables.read_csv(io.BytesIO(content))
    ]
    assert found == wanted


def test_a_cell_in_another_encoding_is_a_bad_row(tmp_path: Path) -> None:
    content = b'prompt,completion\r\na,b\r\n"c\r\n",caf\xe9\r\ne,f\r\n'
    rows = read(tmp_path / "a.csv", content, Format.prompt_completion)
    assert places(rows) == [(2, True), (3, False), (5, True)]
    bad = rows[1]
    assert isinstance(bad, Rejected) and not bad.ends_file
    assert bad.byte == content.index(b"\xe9") and "UTF-8" in bad.what
    with pytest.raises(BadFile, match="UTF-8") as caught:  # of the header
        list(tables.read_csv(io.BytesIO(BOM + b"prompt,comp\xe9tion\nA,B\n")))
    assert (caught.value.line, caught.value.byte) == (1, 14)


# ------------------------------------------------------------------------- lists in cells


@pytest.mark.parametrize("write", [json.dumps, lambda turns: json.dumps(turns, indent=1)])
def test_lists_in_cells_are_json(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["prompt", "completion"])
        table.writerow([write(USER), write(ANSWER)])
        table.writerow(["[{x}] and [1]", "[x] {y}"])
    lists, texts = Reader(str(path), format=Format.prompt_completion)
    assert isinstance(lists, Record) and lists.messages == (*USER, *ANSWER)
    assert isinstance(texts, Record) and texts.text == "[{x}] and [1][x] {y}"


@pytest.mark.parametrize("name", ["prompt", "completion", "chosen", "rejected", "messages"])
def test_a_list_as_python_writes_it_is_refused(tmp_path: Path, name: str) -> None:
    others = {
        "prompt": USER,
        "chosen": ANSWER,
        "rejected": [ANSWER[0] | {"content": "b"}],
    }
    format = Format.preference if name in ("chosen", "rejected") else Format.prompt_completion
    others = others if format is Format.preference else {"prompt": USER, "completion": ANSWER}
    if name == "messages":
        format, others = Format.messages, {"messages": ANSWER}
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(others)
        table.writerow([str(v) if key == name else json.dumps(v) for key, v in others.items()])
    (bad,) = Reader(str(path), format=format)
    assert isinstance(bad, Rejected) and bad.field == name
    assert name in bad.what and "json.dumps" in bad.fix and "parquet" in bad.fix


# --------------------------------------------------------------- parquet and datasets


def test_a_long_row_of_a_table_is_rejected(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    half = "é" * (MAX_LINE_BYTES // 4)
    texts = [
        "a",
        half + half[:-2],
        "b",  # with its key as long as may be
        half + half + "x",
        "c",
    ]
    table = pa.table({"text": texts})
    encoded = pa.table({"text": table["text"].dictionary_encode()})
    parquet.write_table(table, tmp_path / "a.parquet")
    parquet.write_table(encoded, tmp_path / "b.parquet")  # comes out as a dictionary
    datasets.Dataset(table).save_to_disk(tmp_path / "d")
    for path in (f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet", f"hf:{tmp_path}/d"):
        rows = list(Reader(path, format=Format.text))
        assert places(rows) == [(1, True), (2, True), (3, True), (4, False), (5, True)]
        assert [r.text for r in rows if isinstance(r, Record)] == texts[:3] + texts[4:]
        bad = rows[3]
        assert isinstance(bad, Rejected) and not bad.ends_file
        assert "longer than 8 MiB" in bad.what


def test_rows_of_any_width_come_in_order(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    texts = [f"{i} " + "x" * (i * 7919 % 300_000 if i % 300 > 250 else 5) for i in range(900)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": texts}), path, row_group_size=350)
    reader = Reader(str(path), format=Format.text)
    rows = list(reader)
    assert [row.text for row in rows if isinstance(row, Record)] == texts
    assert places(rows) == [(i, True) for i in range(1, 901)]
    assert [row for unit in reader.units(1) for row in reader.read(unit)] == rows
