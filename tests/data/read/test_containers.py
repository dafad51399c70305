"""The same rows from every container, in bounded memory, in one process or cut into units."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import Format
from posttrain_dist.data.formats.records import Reader, Rejected, find_files
from posttrain_dist.data.read.json_lines import MAX_LINE_BYTES, load
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Record

TEXTS = [f"row {i}, \u2028 “é” \n" + "x" * (i % 7) for i in range(50)]
JSONL = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def read(path: object, format: Format = Format.text, **more: Any) -> list[Record]:
    rows = list(Reader(str(path), format=format, **more))
    assert [row for row in rows if isinstance(row, Rejected)] == []
    return [row for row in rows if isinstance(row, Record)]


def rejected(path: object, format: Format = Format.text) -> list[Rejected]:
    return [row for row in Reader(str(path), format=format) if isinstance(row, Rejected)]


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 8) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def make(folder: Path, name: str) -> Path:
    """TEXTS as a file of the kind that `name` ends with."""
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(JSONL))
    elif name.endswith(".zst"):
        path.write_bytes(zstd(JSONL[:500]) + zstd(JSONL[500:]))  # two frames, as pigz or cat write
    elif name.endswith(".parquet"):
        write_parquet(path, [{"text": text} for text in TEXTS])
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            table = csv.writer(stream)
            table.writerow(["", "text", "task_type"])
            table.writerows([i, text, ""] for i, text in enumerate(TEXTS))
    elif name.endswith(".json"):
        path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    else:
        path.write_bytes(JSONL)
    return path


KINDS = ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.csv", "a.txt"]


@pytest.mark.parametrize("name", KINDS)
def test_every_container_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    path = make(tmp_path, name)
    records = read(path)
    assert [record.text for record in records] == TEXTS
    assert {record.channel for record in records} == {"a"}
    reader = Reader(str(path), accepts={Format.text})
    assert reader.format is Format.text and reader.recognised
    places = [int(record.where.removeprefix(f"{path}:")) for record in records]
    if name == "a.csv":  # the line where each row starts: each text holds one line feed
        assert places == list(range(2, 102, 2))
    elif name == "a.json":  # `[`, then `{`, text, `}` for each
        assert places == list(range(2, 152, 3))
    else:
        assert places == list(range(1, 51))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("unit_bytes", [1, 100, 1000, 10**6])
def test_units_in_order_are_the_whole(tmp_path: Path, name: str, unit_bytes: int) -> None:
    path = make(tmp_path, name)
    reader = pickle.loads(pickle.dumps(Reader(str(path), format=Format.text)))
    units = pickle.loads(pickle.dumps(list(reader.units(unit_bytes))))
    assert [row for unit in units for row in reader.read(unit)] == list(reader)
    if name == "a.jsonl" and unit_bytes < 10**6:
        ends = [JSONL[: unit.end] for unit in units]
        assert all(part.endswith(b"\n") for part in ends)
        assert len(units) == (
            50 if unit_bytes == 1 else pytest.approx(len(JSONL) / unit_bytes, 0.5)
        )
    if name == "a.parquet":
        assert [(unit.start, unit.first) for unit in units] == [(i, i * 8 + 1) for i in range(7)]


def test_units_cross_the_blocks_that_are_read(tmp_path: Path) -> None:
    rows = [{"text": "é" * (n * 7919 % 300_000 + 1)} for n in range(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    reader = Reader(str(path), format=Format.text)
    for unit_bytes in (200_000, 1 << 20, (1 << 20) + 1, 3_000_000):
        units = list(reader.units(unit_bytes))
        found = [row for unit in units for row in reader.read(unit)]
        assert [row.text for row in found if isinstance(row, Record)] == [r["text"] for r in rows]
        wheres = [row.where for row in found if isinstance(row, Record)]
        assert wheres == [f"{path}:{2 * i + 1}" for i in range(30)]
        assert len(units) > 1


def test_a_folder_may_mix_containers(tmp_path: Path) -> None:
    for name in ("b.parquet", "c.csv", "a.jsonl.gz", ".hidden.jsonl", "dataset_info.json", "n.txt"):
        make(tmp_path, name)
    names = ["a.jsonl.gz", "b.parquet", "c.csv"]
    assert [file.name for file in find_files(str(tmp_path))] == names
    assert [r.channel for r in read(tmp_path)] == ["a"] * 50 + ["b"] * 50 + ["c"] * 50
    assert [r.text for r in read(f"{tmp_path}/[bc].*")] == TEXTS * 2


def test_conversations_in_tables(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": "2"}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [call, other]},
                {"role": "tool", "content": "r", "tool_call_id": "1"},
                {"role": "assistant", "content": "a"},
            ],
            "check": None,
        }
    ] * 3
    (first, *_) = read(write_parquet(tmp_path / "a.parquet", rows), Format.messages)
    # A struct has all keys of all rows; those of others are nulls and do not come through.
    assert first.messages == (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call, other]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "assistant", "content": "a"},
    )
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["dialog", "channel"])
        table.writerow([json.dumps(rows[0]["messages"]), "calls"])
        table.writerow(["[{", "calls"])
        table.writerow(["x"])
    read_back = list(Reader(str(path), format=Format.messages, columns={"messages": "dialog"}))
    assert read_back[0] == Record(
        channel="calls", where=f"{path}:2", messages=first.messages, check=None
    )
    content = path.read_bytes()
    third, fourth = read_back[1:]
    assert isinstance(third, Rejected) and isinstance(fourth, Rejected)
    assert (third.line, third.byte, third.field) == (3, content.index(b"[{,"), "messages")
    assert (fourth.line, fourth.byte) == (4, content.index(b"x\r\n"))
    assert "1 cells" in fourth.what and "2" in fourth.what


def test_a_csv_that_cannot_be_read_on(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for content, line, byte, part in (
        (b'text\na\n"b\nc', 3, 7, "unexpected end"),
        (b"te\xfft\na\n", 1, 2, "UTF-8"),
        (b"text,text\na,b\n", 1, 0, "'text' stands twice"),
        (b"text\n", 0, None, "holds no row"),
        (b"", 0, None, "holds no row"),
    ):
        path.write_bytes(content)
        last = rejected(path)[-1]
        assert (last.line, last.byte, last.ends_file) == (line, byte, True)
        assert part in last.what


def test_a_json_array_is_read_element_by_element(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good = ['{"text": "a\\"]},["}', '{"text":\n "b", "n": [[], {"m": "{"}]}', '{"text": ""}']
    content = ("\ufeff \n[" + " ,\n".join(good) + "\n] \n").encode()
    path.write_bytes(content)
    rows = list(Reader(str(path), format=Format.text))
    assert [row.text for row in rows[:2] if isinstance(row, Record)] == ['a"]},[', "b"]
    assert isinstance(rows[0], Record) and rows[0].where == f"{path}:2"
    assert isinstance(rows[2], Rejected) and rows[2].field == "text"
    assert (rows[2].line, rows[2].byte) == (5, content.rindex(b"{"))
    for broken, line, byte, part in (
        (b'[{"text":"a"},\n{"text":"b"', 2, 15, "ends inside the array"),
        (b'[{"text":"a"}]\n\n x', 3, 17, "follows the array"),
        (b'[{"text":"a"},]', 1, 14, "element is missing"),
        (b'[{"text":"a"}}]', 1, 1, "} without {"),
        (b"[]", 0, None, "holds no row"),
    ):
        path.write_bytes(broken)
        last = rejected(path)[-1]
        assert (last.line, last.byte, last.ends_file) == (line, byte, True), broken
        assert part in last.what


def test_a_large_array_keeps_its_lines(tmp_path: Path) -> None:
    rows = [{"text": "[" * (n % 97 + 1) + '"' + "é" * (n * 7919 % 9000)} for n in range(600)]
    path = tmp_path / "a.json"
    path.write_text("[" + ",\n".join(json.dumps(row) for row in rows) + "]")
    records = read(path)
    assert [record.text for record in records] == [row["text"] for row in rows]
    assert [record.where for record in records] == [f"{path}:{i + 1}" for i in range(600)]


def test_a_long_element_of_an_array_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    text = b'{"text":\n"' + b'\\\\,]\\"' * (MAX_LINE_BYTES // 6) + b'"}'
    lists = b'{"text":"x","n":[' + b"[7,{}%b],\n" % (b" " * 999) * (MAX_LINE_BYTES // 1000) + b"0]}"
    good = b'{"text":"y"}'
    for long in (text, lists, good[:-1] + b" " * MAX_LINE_BYTES + b"}"):
        content = b"[" + good + b",\n \n" + long + b"\n,\n" + good + b"]"
        path.write_bytes(content)
        first, bad, last = Reader(str(path), format=Format.text)
        assert isinstance(first, Record) and isinstance(last, Record)
        assert last.where == f"{path}:{content.count(10) + 1}"
        assert isinstance(bad, Rejected) and "longer than 8 MiB" in bad.what
        assert (bad.line, bad.byte, bad.ends_file) == (3, len(good) + 5, False)
        path.write_bytes(content[: -len(good) - 5])
        (*_, end) = Reader(str(path), format=Format.text)
        assert isinstance(end, Rejected) and end.ends_file and "ends inside" in end.what
        assert (end.line, end.byte) == (3, len(good) + 5)
    open_quote = (
        good + b',\n{"text":"y},\n' + b'{"text":"it: so, I said"},' * (MAX_LINE_BYTES // 20)
    )
    path.write_bytes(b"[" + open_quote + b'{"text":"y}]')  # of two rows
    (*_, end) = Reader(str(path), format=Format.text)  # not one row, of which the rest is a part
    assert isinstance(end, Rejected) and end.ends_file and "not closed" in end.fix
    assert (end.line, end.byte) == (2, len(good) + 3)


def test_a_packed_file_cut_short_is_never_skipped(tmp_path: Path) -> None:
    for name, pressed in (("a.jsonl.gz", gzip.compress(JSONL)), ("a.jsonl.zst", zstd(JSONL))):
        path = tmp_path / name
        path.write_bytes(pressed[: len(pressed) * 2 // 3])
        last = rejected(path)[-1]
        assert last.ends_file and "cannot be unpacked" in last.what
        assert last.byte is not None and JSONL[: last.byte].count(b"\n") + 1 == last.line
        path.write_bytes(b"no such thing")
        (last,) = rejected(path)
        assert last.ends_file


def test_a_line_above_the_limit_is_rejected_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    longest = b'{"text":"' + b"x" * (MAX_LINE_BYTES - 11) + b'"}'
    assert len(longest) == MAX_LINE_BYTES
    good = b'{"text":"y"}'
    for end in (b"\n", b"\r\n"):
        path.write_bytes(longest + end + longest + b" " + end + good + end)
        rows = list(Reader(str(path), format=Format.text))
        lengths = [len(row.text or "") for row in rows if isinstance(row, Record)]
        assert lengths == [MAX_LINE_BYTES - 11, 1]
        (bad,) = (row for row in rows if isinstance(row, Rejected))
        assert (bad.line, bad.byte, bad.ends_file) == (2, len(longest + end), False)
        assert "longer than 8 MiB" in bad.what
        del rows


# Peak memory of one pass over the rows, above what the imports take. Not from getrusage: its peak
# is that of the parent, too, which has just written the file.
PEAK = """
import sys
from posttrain_dist.data import Format
from posttrain_dist.data.formats.records import Reader
import pyarrow.parquet
def mib(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
if sys.argv[1].startswith("hf:"):  # what is mapped counts as resident, and can be given back
    import datasets
    count, before, most = 0, mib("RssAnon:"), 0.0
    for count, _ in enumerate(Reader(sys.argv[1], format=Format.text), 1):
        most = max(most, mib("RssAnon:")) if count % 8 == 0 else most
    print(count, most - before)
else:
    before = mib("VmRSS:")
    count = sum(1 for _ in Reader(sys.argv[1], format=Format.text))
    print(count, mib("VmHWM:") - before)
"""


def peak_mib(path: Path | str) -> tuple[int, float]:
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, mib = done.stdout.split()
    return int(count), float(mib)


KINDS_OF_LARGE = ["lines", "longest", "one line", "parquet", "shared text", "dataset"]
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("array", "gz")]


def write_large(kind: str, folder: Path) -> tuple[Path | str, int]:
    """(path, number of rows)."""
    line = json.dumps({"text": "a colon: and \\u00e9 " * 50}).encode()
    count = 150_000_000 // len(line)
    path = folder / "a.jsonl"
    if kind == "lines":
        path.write_bytes((line + b"\n") * count)
    elif kind == "longest":
        count = 10
        long = b'{"text":"' + "é€".encode() * ((MAX_LINE_BYTES - 12) // 5) + b'"}\n'
        path.write_bytes(long * count)
    elif kind == "one line":  # rejected
        count = 1
        path.write_bytes(b'{"text":"' + b"a" * 150_000_000 + b'"}')
    elif kind == "array":
        path = folder / "a.json"
        path.write_bytes(b"[" + (line + b",\n") * (count - 1) + line + b"]")
    elif kind == "gz":
        path = folder / "a.jsonl.gz"
        path.write_bytes(gzip.compress((line + b"\n") * count, 1))
    else:
        return write_large_table(kind, folder)
    return path, count


def write_large_table(kind: str, folder: Path) -> tuple[Path | str, int]:
    import datasets
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    path = folder / "a.parquet"
    if kind == "parquet":
        count = 100_000  # in one row group, of text that packs badly
        letters = np.random.default_rng(0).integers(97, 123, (count, 1000), dtype=np.uint8)
        texts = pa.array([row.tobytes().decode() for row in letters])
        parquet.write_table(pa.table({"text": texts}), path, row_group_size=count)
        return path, count
    if kind == "shared text":  # stands once in the file
        document = pa.repeat(pa.scalar("word " * 40_000), 3000)
        parquet.write_table(pa.table({"text": document}), path)
        return path, 3000
    rows = datasets.Dataset.from_dict({"text": [f"{i}" + "x" * 400_000 for i in range(400)]})
    rows.save_to_disk(folder / "d")
    return f"hf:{folder}/d", 400


@pytest.mark.parametrize("kind", [*KINDS_OF_LARGE, *SLOW])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    """Up to 600 MB of rows take less than 64 MiB and the longest line that is allowed."""
    path, count = write_large(kind, tmp_path)
    found, mib = peak_mib(path)
    assert found == count
    assert 0 < mib < 64 + MAX_LINE_BYTES / 2**20


def test_a_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    datasets.DatasetDict({"train": rows, "dev": rows.select(range(3))}).save_to_disk(tmp_path / "d")
    name = f"hf:{tmp_path}/d"
    records = read(name)
    assert [record.text for record in records] == TEXTS
    assert (records[2].where, records[2].channel) == (f"{name}:3", "d")
    assert [record.text for record in read(f"{name}:dev")] == TEXTS[:3]
    assert find_files(name) and all(f.suffix == ".arrow" for f in find_files(name))
    reader = Reader(name, format=Format.text)
    assert [row for unit in reader.units(1) for row in reader.read(unit)] == list(reader)

    (tmp_path / "p").mkdir()  # a folder as it lies on the hub
    write_parquet(tmp_path / "p" / "train.parquet", [{"text": text} for text in TEXTS])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert [record.text for record in read(f"hf:{tmp_path}/p")] == TEXTS
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        read(f"{name}:nosuch")
    assert caught.value.where == f"{name}:nosuch"
    for part in ("train[:2]", "train+dev"):  # load_from_disk knows none: nothing is passed over
        with pytest.raises(DataError, match="has no slice") as caught:
            read(f"{name}:{part}")
        assert ".select(" in caught.value.fix
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets"):
        read("hf:owner/name")


def test_strict_json_is_exact() -> None:
    assert load(b'{"n": 123456789012345678901234567890}') == {"n": 123456789012345678901234567890}
    assert load(rb'{"a":"\u003a:","b\u003A":[":",{"c":1}]}') == {
        "a": "::",
        "b:": [":", {"c": 1}],
    }
    deep = b'{"a":' * 254 + b"1" + b"}" * 254
    assert load(deep) == json.loads(deep)
