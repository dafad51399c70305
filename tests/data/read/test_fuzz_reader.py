"""Whatever a file holds: no exception, every row is a Record or is rejected at its own place.

What is expected comes from the bytes alone: `bytes.split` says where lines are, and Python's own
`json` what they hold.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain_dist.data import Format
from posttrain_dist.data.formats.records import Reader, Rejected
from posttrain_dist.data.read import json_array
from posttrain_dist.flow import Record

BOM = b"\xef\xbb\xbf"
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,  # a failure comes back in the next run
    "suppress_health_check": list(HealthCheck),
}
# One good row of each format; `@` is replaced by generated text.
ROWS: dict[Format, list[dict[str, Any]]] = {
    Format.messages: [
        {"messages": [{"role": "user", "content": "@"}, {"role": "assistant", "content": "@"}]},
        {
            "messages": [
                {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
                {"role": "tool", "content": "@", "tool_call_id": "1"},
                {"role": "assistant", "content": [{"type": "text", "text": "@"}], "train": False},
            ],
            "tools": [{"name": "f"}],
        },
    ],
    Format.sharegpt: [{"conversations": [{"from": "gpt", "value": "@"}], "source": "x"}],
    Format.alpaca: [{"instruction": "a@", "input": "@", "output": "b@"}],
    Format.prompt_completion: [{"prompt": "@", "completion": "b@"}],
    Format.text: [{"text": "a@"}],
    Format.tokens: [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [1]}],
    Format.preference: [
        {"prompt": "a@", "chosen": "b@", "rejected": "c@"},
        {"prompt": "a@", "chosen": "b@", "rejected": "c", "margin": 0.5, "system": "@"},
    ],
    Format.ranking: [
        {"prompt": "a@", "answers": ["b@", "c@", [{"role": "assistant", "content": "d@"}]]},
        {"prompt": "a@", "answers": ["b", "c"], "ranks": [2, 1]},
    ],
    Format.scored_answers: [{"prompt": "a@", "answers": ["b@", "c@"], "scores": [0.5, -1]}],
    Format.scored_completion: [{"prompt": "a@", "completion": "b@", "score": 7}],
    Format.unpaired: [{"prompt": "a@", "completion": "b@", "label": True}],
    Format.prompt: [{"prompt": "a@", "answer": 7}],
}
TEXTS = [
    "\u2028",
    "\u0085\x1c\x0b",
    "\x00",
    "<|im_end|><|im_start|>",
    "\r",
    ":",
    '":"',
    "\\",
    "😀",
    "é",
    "\ufeff",
    '\\"',
    "\n{",
    "x",
]
GARBAGE = [
    b"", b" ", b"\r", b"\t \x0c", BOM, b"\x00", b"\xff\xfe", b"\xed\xa0\x80", "\u2028".encode(),
    b"[]", b"[1]", b"null", b"1", b'"x"', b"{}", b"{", b"}", b'{"', b"[" * 100_000,
    b'{"a":' * 100_000, b"NaN", b'{"text":NaN}', b'{"text":-Infinity}', b'{"text":1e999}',
    b'{"text":%s}' % (b"7" * 5000), b'{"input_ids":[99999999999999999999]}',
    b'{"input_ids":[1],"labels":[18446744073709551616]}', b'{"input_ids":[true,1.0]}',
    rb'{"text":"\ud800"}', rb'{"\udfff":1,"text":"x"}', b'{"text":"a","text":"b"}',
    rb'{"text":"a","text":"\u003a"}', b'{"text":"a"} {}', b'{"text":"a",}', b'{"text":"\xff"}',
    b'{"text":"a\x00"}', b'{"task_type":"","text":"x"}', b'{"task_type":null,"text":"x"}',
    b'{"messages":[{"role":"assistant","content":"x","weight":1e400}]}',
    b'{"messages":[[]],"tools":"["}', b'{"messages":[{"role":[],"content":""}]}',
    b'{"messages":[{"role":"assistant","tool_calls":[{"name":"f","arguments":"[" }]}]}',
    b'{"prompt":[],"completion":""}', b'{"prompt":[[]],"chosen":[{}],"rejected":"x"}',
    b'{"prompt":"a","answers":[[]],"scores":[1e400]}', b'{"prompt":"a","answers":{},"ranks":1}',
    b'{"prompt":"a","completion":"b","label":"x","score":%s}' % (b"9" * 400),
    b'{"prompt":"a","answers":["b","c"],"scores":[%s,true]}' % (b"9" * 400),
]  # fmt: skip


class Choices:
    """Bytes from Hypothesis read as choices: one draw a file, as draws are what takes the time."""

    def __init__(self, content: bytes) -> None:
        self.content = iter(content)

    def below(self, count: int) -> int:
        return next(self.content, 0) % count

    def one_of(self, things: Sequence[Any]) -> Any:
        return things[self.below(len(things))]


def good_line(draw: Choices, format: Format) -> bytes:
    """A row that must be read."""
    text = "".join(draw.one_of(TEXTS) for _ in range(draw.below(4)))
    row = json.dumps(draw.one_of(ROWS[format])).replace("@", json.dumps(text)[1:-1])
    if draw.below(2):
        row = json.dumps(json.loads(row), ensure_ascii=False, separators=(",", ":"))
    return row.encode()


def spoilt_line(draw: Choices, format: Format) -> bytes:
    """A row with some bytes cut, doubled or replaced."""
    line = good_line(draw, format)
    at = draw.below(256) % len(line)
    end = at + draw.below(8)
    new = [b"", b'"', b"\x00", b"\xff", b"[", b"}", b",", b"1", b":", line[at:end] * 2]
    return line[:at] + draw.one_of(new) + line[end:]


def make_file(draw: Choices) -> tuple[Format, bytes, set[int]]:
    """(format, bytes, numbers of the lines that must be read)."""
    format = draw.one_of(list(ROWS))
    content, good = draw.one_of([b"", b"", BOM]), set()
    for kind in [draw.one_of("ggss#b") for _ in range(draw.below(6))]:
        if kind == "g":
            line = good_line(draw, format)
            good.add(content.count(b"\n") + 1)
        elif kind == "s":
            line = spoilt_line(draw, format)
        elif kind == "#":
            line = draw.one_of(GARBAGE)
        else:
            line = bytes(draw.below(256) for _ in range(draw.below(9)))
        content += line + draw.one_of([b"\n", b"\n", b"\r\n", b"\n\n"])
    if content.endswith(b"\n") and draw.below(2):  # no final newline, or a line cut short
        content = content[: max(0, len(content) - draw.one_of([1, 1, 2, 7]))]
        good.discard(content.count(b"\n") + 1)
    return format, content, good


def lines_of(content: bytes) -> dict[int, tuple[int, bytes]]:
    """Number -> (start, bytes) of the lines that are not blank."""
    starts = itertools.accumulate((len(part) + 1 for part in content.split(b"\n")), initial=0)
    lines = {}
    for number, (start, line) in enumerate(zip(starts, content.split(b"\n"), strict=False), 1):
        if (line.removeprefix(BOM) if number == 1 else line).strip():
            lines[number] = start, line
    return lines


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def texts_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [text for item in value for text in texts_of(item)] if hasattr(value, "__iter__") else []


def check(path: Path, format: Format, content: bytes, good: set[int]) -> None:
    """Read and compare with what the bytes say."""
    path.write_bytes(content)
    reader = Reader(str(path), format=format)
    rows = list(reader)
    lines = lines_of(content)
    if not lines:
        assert [(r.ends_file, r.line) for r in rows if isinstance(r, Rejected)] == [(True, 0)]
        assert [row for unit in reader.units(1) for row in reader.read(unit)] == rows
        return
    numbers = []
    for row in rows:
        if isinstance(row, Record):
            number = int(row.where.removeprefix(f"{path}:"))
            line = lines[number][1].decode("utf-8-sig" if number == 1 else "utf-8")
            value = json.loads(line, object_pairs_hook=unique, parse_constant=pytest.fail)
            assert isinstance(value, dict)
            json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
            of_row = "".join(texts_of(value))
            answers = (message for answer in row.answers for message in answer.messages)
            for message in (*row.messages, *answers):
                assert message["content"] in of_row or format is Format.alpaca
        else:
            number = row.line
            start, line = lines[number]
            assert row.byte is not None and start <= row.byte <= start + len(line)
            assert row.file == str(path) and row.what and row.fix and not row.ends_file
            assert row.error().where == f"{path}:{number} (byte {row.byte})"
            assert number not in good, row.what
        numbers.append(number)
    assert numbers == list(lines)  # every line that is not blank, once, in order
    if len(lines) % 2:  # opening files takes the time
        in_parts = [row for unit in reader.units(64) for row in reader.read(unit)]
        assert in_parts == rows


def check_packed(folder: Path, format: Format, content: bytes, share: float) -> None:
    """The same packed; and cut short: what comes out is the same as far as it goes."""
    plain, packed = folder / "rows.jsonl", folder / "rows.jsonl.gz"
    plain.write_bytes(content)
    pressed = gzip.compress(content, 1)
    packed.write_bytes(pressed)

    def results(path: Path) -> list[Any]:
        rows = list(Reader(str(path), format=format))
        return [
            (r.line, r.byte, r.what) if isinstance(r, Rejected) else r.where.rsplit(":")[-1]
            for r in rows
        ]

    whole = results(plain)
    assert results(packed) == whole
    packed.write_bytes(pressed[: max(1, int(share * (len(pressed) - 1)))])
    *before, last = Reader(str(packed), format=format)
    assert isinstance(last, Rejected) and last.ends_file
    assert results(packed)[:-1] == whole[: len(before)]
    if last.line:  # otherwise not even the head could be read
        assert last.byte is not None
        assert content[: last.byte].count(b"\n") + 1 == last.line


def run_fuzz(folder: Path, plain: int, packed: int) -> None:
    @settings(max_examples=plain, **SETTINGS)
    @given(st.binary(min_size=24, max_size=80))
    def lines(choices: bytes) -> None:
        check(folder / "rows.jsonl", *make_file(Choices(choices)))

    @settings(max_examples=packed, **SETTINGS)
    @given(st.binary(min_size=24, max_size=80), st.floats(0, 1))
    def packs(choices: bytes, share: float) -> None:
        check_packed(folder, *make_file(Choices(choices))[:2], share)

    lines()
    packs()


def test_any_jsonl_is_read_or_rejected_at_its_place(tmp_path: Path) -> None:
    run_fuzz(tmp_path, 1400, 100)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_any_jsonl_is_read_or_rejected_at_its_place_1e5(tmp_path: Path) -> None:
    run_fuzz(tmp_path, 95_000, 5_000)


@pytest.mark.parametrize("line", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("format", ROWS, ids=lambda f: f.name)
def test_each_known_trouble_alone_and_between_good_rows(
    format: Format, line: bytes, tmp_path: Path
) -> None:
    row = json.dumps(ROWS[format][0]).encode()
    check(tmp_path / "a.jsonl", format, line, set())
    check(tmp_path / "b.jsonl", format, BOM + row + b"\r\n" + line + b"\n" + row, {1, 3})


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls", "name",
                         "function", "arguments", "weight", "train", "id", "prompt", "messages"]),
        below, max_size=4),
    max_leaves=12,
), st.sampled_from(list(ROWS)), st.data())  # fmt: skip
@settings(max_examples=500, **SETTINGS)
def test_any_json_in_any_field(
    tmp_path_factory: pytest.TempPathFactory, value: Any, format: Format, data: st.DataObject
) -> None:
    """Values of the wrong kind are rejected, and the field is one of the row's."""
    row = dict(ROWS[format][0]) | {"tools": []} if data.draw(st.booleans()) else ROWS[format][0]
    name = data.draw(st.sampled_from([*row, "task_type", "tools", "system", "history", "check"]))
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps({**row, name: value}) + "\n")
    (result,) = Reader(str(path), format=format)
    if isinstance(result, Rejected):
        assert (result.line, result.ends_file) == (1, False)
        allowed = {*row, name, "", "completion", "labels", "rejected"}
        root = result.field.split(".")[0].split("[")[0]
        assert root in allowed or "JSON" in result.what


def parquet(folder: Path) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(50)]}), buffer, row_group_size=20)
    return buffer.getvalue()


@settings(max_examples=200, **SETTINGS)
@given(st.data())
def test_parquet_with_wrong_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    content = bytearray(parquet(folder))
    how = data.draw(st.sampled_from(["cut", "footer", "length", "magic"]))
    if how == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif how == "footer":  # what says where the columns are
        size = int.from_bytes(content[-8:-4], "little")
        at = data.draw(st.integers(len(content) - 8 - size, len(content) - 9))
        content[at] ^= data.draw(st.integers(1, 255))
    elif how == "length":
        content[-8:-4] = data.draw(st.integers(0, 2**32 - 1)).to_bytes(4, "little")
    else:
        content[-1] ^= 1
    path = folder / "bad.parquet"
    path.write_bytes(content)
    reader = Reader(str(path), format=Format.text)
    for rows in (list(reader), [row for unit in reader.units(1) for row in reader.read(unit)]):
        rejected = [row for row in rows if isinstance(row, Rejected)]
        assert all(row.file == str(path) and row.what and row.fix for row in rejected)
        if how != "footer":
            assert [row.ends_file for row in rejected] == [True] and len(rows) == 1


@settings(max_examples=500, **SETTINGS)
@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=6), st.integers(1, 9))
def test_elements_of_any_length_are_found_where_they_stand(
    monkeypatch: pytest.MonkeyPatch, drawn: list[bytes], block_bytes: int
) -> None:
    """What is expected is what was written; long ones come as null, in blocks of a few bytes."""
    monkeypatch.setattr(json_array, "MAX_LINE_BYTES", 24)
    monkeypatch.setattr(json_array, "_BLOCK_BYTES", block_bytes)
    content, wanted = b"[", []
    for i, choices in enumerate(drawn):
        draw = Choices(choices)
        text = "".join(draw.one_of([*TEXTS, "[", "}", ",", "\\\\"]) for _ in range(draw.below(8)))
        value = draw.one_of([text, {text: [text, {}]}, [[text], 7], 7])
        element = json.dumps(value, indent=draw.one_of([None, 1]), ensure_ascii=False).encode()
        content += (b"," if i else b"") + draw.one_of([b"", b"\n", b" \r\n"])
        wanted.append((content.count(b"\n") + 1, len(content), element))
        content += element + draw.one_of([b"", b"\n", b" "])
    found = list(json_array.read_elements(io.BytesIO(content + b"]\n")))
    assert [(line, byte) for line, byte, _ in found] == [(line, byte) for line, byte, _ in wanted]
    for (_, _, text), (_, _, element) in zip(found, wanted, strict=True):
        assert text == (element if len(element) <= 24 else None)
