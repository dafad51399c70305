"""Bad rows are told by file, line, byte and field; good rows come through as written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain_dist.data.formats.records import read_records
from posttrain_dist.errors import DataError, SeveralErrors

GOOD = b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}'


def _file(folder: Path, content: bytes, name: str = "chat.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_channel_is_task_type_else_the_stem(tmp_path: Path) -> None:
    typed = GOOD[:-1] + b',"task_type":"sums","check":"exact","id":7}'
    path = _file(tmp_path, GOOD + b"\n" + typed + b"\n")
    records = read_records(str(path), "messages")
    assert [(r.channel, r.where, r.check) for r in records] == [
        ("chat", f"{path}:1", None),
        ("sums", f"{path}:2", "exact"),
    ]
    assert records[0].messages == (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    )


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    separators = "one\u2028two\u0085three\x1cfour"  # str.splitlines would cut at each of them
    row = json.dumps({"text": separators.replace("\x1c", "")}, ensure_ascii=False).encode()
    content = b"\xef\xbb\xbf" + row + b"\r\n\n" + b'{"text":"last"}'  # BOM, CRLF, blank, no LF
    records = read_records(str(_file(tmp_path, content)), "text")
    assert [r.text for r in records] == ["one\u2028two\u0085threefour", "last"]
    assert [r.where.rsplit(":", 1)[1] for r in records] == ["1", "3"]


def test_folder_and_glob_read_files_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        _file(tmp_path, GOOD, name)
    assert [r.channel for r in read_records(str(tmp_path), "messages")] == ["a", "b"]
    assert [r.channel for r in read_records(f"{tmp_path}/*", "messages")] == ["a", "b", "c"]


def _messages(*turns: object) -> bytes:
    return json.dumps({"messages": turns}).encode()


USER = {"role": "user", "content": "q"}
SURROGATE = rb'{"messages":[{"role":"assistant","content":"\ud800"}]}'
# (second line of a file, byte in that line, parts of the message)
BAD_MESSAGES = [
    (b'{"messages": [}', 14, ["not valid JSON", "column 15"]),
    ('{"é": [}'.encode(), 8, ["not valid JSON", "column 8"]),
    (b'{"messages": "\xff"}', 14, ["not valid UTF-8"]),
    (b"[1]", 0, ["is a list, expected an object"]),
    (b'{"text": "x"}', 0, ["no key 'messages'", "keys: text", '"assistant"']),
    (b'{"messages": {}}', 0, ["messages is an object"]),
    (_messages(), 0, ["messages is an empty list"]),
    (_messages("x"), 0, ["messages[0] is text"]),
    (_messages(USER), 0, ["no assistant turn"]),
    (_messages({"role": "bot", "content": "x"}), 0, ["messages[0].role is 'bot'", "assistant"]),
    (_messages(USER, {"role": "assistant", "content": 3}), 0, ["messages[1].content is a number"]),
    (_messages({"role": "assistant", "content": None}), 0, ["messages[0].content is null"]),
    (_messages({"role": "assistant"}), 0, ["messages[0] has no key 'content'"]),
    (
        _messages(USER | {"tool_calls": [1]}),
        0,
        ["messages[0].tool_calls is not supported in a user"],
    ),
    (SURROGATE, 0, ["messages[0].content", "surrogate"]),
    (GOOD[:-1] + b',"task_typ":"x"}', 0, ["unknown key 'task_typ'", "'task_type'"]),
    (GOOD[:-1] + b',"task_type":5}', 0, ["task_type is a number"]),
    (GOOD[:-1] + b',"task_type":"a\\nb"}', 0, ["task_type is 'a\\nb'"]),
    (GOOD[:-1] + b',"task_type":" "}', 0, ["task_type is ' '"]),
    (GOOD[:-1] + b',"task_type":"' + b"x" * 101 + b'"}', 0, ["task_type has 101 characters"]),
    (GOOD[:-1] + b',"check":"regex"}', 0, ["check is 'regex'"]),
    (GOOD[:-1] + b',"images":["a.png"]}', 0, ["key 'images' is not supported"]),
    (GOOD[:-1] + b',"tools":{}}', 0, ["tools is an object, expected a list"]),
    (GOOD[:-1] + b',"messages":[]}', 0, ["'messages' stands twice"]),
    (b"[" * 100_000, 0, ["JSON", "254 deep"]),
    (GOOD[:-1] + b',"n":' + b"[" * 255 + b"]" * 255 + b"}", 0, ["254 deep"]),
    (GOOD[:-1] + b',"n":' + b"9" * 5000 + b"}", 0, ["cannot be read as JSON", "4300 digits"]),
    (GOOD[:-1] + b',"n":[1e999]}', 0, ["n[0] is a number too large"]),
    (GOOD[:-1] + b',"n":NaN}', 0, ["NaN is no JSON number"]),
    (GOOD[:-1] + b',"n":{"a":1,"b":[{"c":1,"c":1}]}}', 0, ["key 'c' stands twice"]),
    # An escaped colon makes up for the colon of the key that orjson would drop.
    (rb'{"a":1,"a":"\u003a"}', 0, ["key 'a' stands twice"]),
]


@pytest.mark.parametrize(("line", "byte", "parts"), BAD_MESSAGES)
def test_a_bad_row_is_located(tmp_path: Path, line: bytes, byte: int, parts: list[str]) -> None:
    path = _file(tmp_path, GOOD + b"\r\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        read_records(str(path), "messages")
    assert caught.value.where == f"{path}:2 (byte {len(GOOD) + 2 + byte})"
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (GOOD, '{"text": "...", "task_type": "..."}'),
        (b'{"text": 1}', "text is a number"),
        (b'{"text": ""}', "text is empty"),
        (b'{"text": ["a"]}', "text is a list"),
    ],
)
def test_a_bad_text_row_tells_the_expected_format(tmp_path: Path, line: bytes, part: str) -> None:
    with pytest.raises(DataError, match=r"chat\.jsonl:1 ") as caught:
        read_records(str(_file(tmp_path, line)), "text")
    assert part in str(caught.value)


def test_faults_of_several_files_come_together(tmp_path: Path) -> None:
    _file(tmp_path, b"{\n" + GOOD + b"\n{}\n", "a.jsonl")
    _file(tmp_path, GOOD[:-1], "b.jsonl")
    _file(tmp_path, b"x", "c.parquet")
    with pytest.raises(SeveralErrors) as caught:
        read_records(str(tmp_path), "messages")
    places = [p.where.removeprefix(f"{tmp_path}/") for p in caught.value.problems]
    third, end = len(GOOD) + 3, len(GOOD) - 1
    assert places == [
        *("a.jsonl:1 (byte 1)", f"a.jsonl:3 (byte {third})"),
        *(f"b.jsonl:1 (byte {end})", "c.parquet"),
    ]


def test_reading_stops_at_twenty_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_records(str(_file(tmp_path, b"x\n" * 50)), "messages")
    assert "20 or more rows, first at line 1: is not valid JSON" in caught.value.what
    with pytest.raises(DataError) as caught:  # the file has no more
        read_records(str(_file(tmp_path, b"x\n" * 20)), "messages")
    assert "20 rows, first at line 1: is not valid JSON" in caught.value.what


def test_rows_with_one_fault_are_told_once(tmp_path: Path) -> None:
    good, bad = b'{"text": "a"}\n', b'{"text": 5}\n'
    with pytest.raises(DataError) as caught:
        read_records(str(_file(tmp_path, bad * 15 + good * 3)), "text")
    path = tmp_path / "chat.jsonl"
    assert str(caught.value) == (
        f"{path}:1 (byte 0): 15 rows, first at line 1: text is a number, expected text\n"
        "  fix: write it as a JSON string"
    )
    # Others keep their own error, and one row is told as ever.
    with pytest.raises(SeveralErrors) as several:
        read_records(str(_file(tmp_path, good + b'{"text": null}\n' + bad * 3)), "text")
    first, second = (str(problem) for problem in several.value.problems)
    assert first.startswith(f"{path}:2 (byte {len(good)}): text is null")
    assert f"{path}:3 (byte {len(good) + 15}): 3 rows, first at line 3: text is" in second


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.jsonl", tmp_path):
        with pytest.raises(DataError) as caught:
            read_records(str(path), "messages")
        assert caught.value.where == str(path)


def test_a_byte_order_mark_counts_as_bytes(tmp_path: Path) -> None:
    path = _file(tmp_path, b'\xef\xbb\xbf{"text": x}\n\xef\xbb\xbf{"text": "x"}\n')
    with pytest.raises(SeveralErrors) as caught:  # it is dropped at the start of the file only
        read_records(str(path), "text")
    places = [problem.where for problem in caught.value.problems]
    assert places == [f"{path}:1 (byte 12)", f"{path}:2 (byte 15)"]
