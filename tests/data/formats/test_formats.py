"""Each format: what becomes of a good row, which field of a bad one is named, how it is known."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import Format
from posttrain_dist.data.formats.records import Reader, Rejected
from posttrain_dist.errors import ConfigError, DataError
from posttrain_dist.flow import Record

SFT = {Format.messages, Format.sharegpt, Format.alpaca, Format.prompt_completion, Format.tokens}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def read(folder: Path, format: Format, *rows: Any, **more: Any) -> list[Record | Rejected]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(Reader(str(path), format=format, **more))


def one(folder: Path, format: Format, row: Any, **more: Any) -> Record:
    (record,) = read(folder, format, row, **more)
    assert isinstance(record, Record), record
    return record


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


# ------------------------------------------------------------------------------- good rows


def test_messages_with_tools(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"text": "brief"}]},
            user("1 + 2?") | {"name": "eve", "train": True, "refusal": None, "tool_calls": []},
            answer("")
            | {
                "content": None,
                "reasoning_content": "so",
                "tool_calls": [call("add", '{"a": 1, "b": [2]}', id="c1"), call("add", {"a": 2})],
            },
            {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
            {"role": "assistant", "function_call": {"name": "now", "arguments": ""}, "weight": 0},
            {"role": "function", "name": "now", "content": "noon"},
            answer("3") | {"weight": 0.5},
            answer("bye") | {"train": False},
        ],
        "tools": [tool, tool["function"]],
        "parallel_tool_calls": False,
    }
    record = one(tmp_path, Format.messages, row)
    assert record.messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1 + 2?", "name": "eve"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call("add", {"a": 1, "b": [2]}, id="c1"), call("add", {"a": 2})],
            "reasoning_content": "so",
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call("now", {})]},
        {"role": "tool", "content": "noon", "name": "now"},
        {"role": "assistant", "content": "3"},
        {"role": "assistant", "content": "bye"},
    )
    assert record.weights == (None, 1.0, None, None, 0.0, None, 0.5, 0.0)
    assert record.tools == (tool, tool)  # a bare function is wrapped
    as_text = one(tmp_path, Format.messages, row | {"tools": json.dumps(row["tools"])})
    assert as_text == record


def test_sharegpt(tmp_path: Path) -> None:
    turns = [
        ("human", "q"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "r"),
        ("gpt", "a"),
    ]
    row = {
        "conversations": [{"from": who, "value": value} for who, value in turns],
        "system": "s",
        "tools": '[{"name": "f"}]',
    }
    row["conversations"][3]["weight"] = 2  # type: ignore[index]
    record = one(tmp_path, Format.sharegpt, row)
    assert record.messages == (
        {"role": "system", "content": "s"},
        user("q"),
        answer("") | {"tool_calls": [call("f", {"x": 1})]},
        {"role": "tool", "content": "r"},
        answer("a"),
    )
    assert record.weights == (None, None, None, None, 2.0)
    assert record.tools == ({"type": "function", "function": {"name": "f"}},)
    several = '[{"name": "f", "arguments": "{}"}, {"name": "g"}]'
    row = {"conversations": [{"from": "tool_call", "value": several}]}
    (message,) = one(tmp_path, Format.sharegpt, row).messages
    assert message["tool_calls"] == [call("f", {}), call("g", {})]


def test_alpaca(tmp_path: Path) -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3", "check": "exact"}
    record = one(tmp_path, Format.alpaca, row)
    assert record.messages == (user("add\n1 2"), answer("3"))
    assert record.check == "exact"
    row = {"instruction": "add", "input": "", "output": "3", "system": "s", "history": [["q", "a"]]}
    system = {"role": "system", "content": "s"}
    wanted = (system, user("q"), answer("a"), user("add"), answer("3"))
    assert one(tmp_path, Format.alpaca, row).messages == wanted


def test_prompt_completion(tmp_path: Path) -> None:
    record = one(tmp_path, Format.prompt_completion, {"prompt": "é😀 =", "completion": " 3"})
    assert (record.text, record.supervised_from) == ("é😀 = 3", 4)
    assert record.messages == ()
    row: dict[str, Any] = {
        "prompt": [user("q"), answer("x"), user("r")],
        "completion": [answer("a")],
    }
    record = one(tmp_path, Format.prompt_completion, row | {"check": "exact"})
    assert record.messages == (user("q"), answer("x"), user("r"), answer("a"))
    assert record.weights == (0.0, 0.0, 0.0, None)
    row["completion"] = [answer("a") | {"weight": 3}, user("z")]
    assert one(tmp_path, Format.prompt_completion, row).weights == (0.0, 0.0, 0.0, 3.0, None)


def test_tokens(tmp_path: Path) -> None:
    row: dict[str, Any] = {"input_ids": [5, 6, 0], "labels": [-100, 6, 0]}
    record = one(tmp_path, Format.tokens, row | {"attention_mask": [1, 1, 1]})
    assert (record.input_ids, record.labels) == ((5, 6, 0), (-100, 6, 0))
    assert one(tmp_path, Format.tokens, {"input_ids": [5, 6]}).labels == (5, 6)


def preference(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {key: value for key, value in row.items() if value is not None}


Q, A, R, B, C = user("q"), answer("a"), user("r"), answer("b"), answer("c")


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (preference("q", "b", "c"), ([Q], [B], [C])),
        (preference([Q, A, R], "b", "c"), ([Q, A, R], [B], [C])),
        (preference([Q, A, R], [B], [C]), ([Q, A, R], [B], [C])),
        (preference(None, [Q, A, R, B], [Q, A, R, C]), ([Q, A, R], [B], [C])),
        (preference("r", [Q, A, R, B], [Q, A, R, C]), ([Q, A, R], [B], [C])),
        (preference([Q], [Q, B], [Q, C, R, A]), ([Q], [B], [C, R, A])),
        (preference([Q], [A, R, B], [A, R, C]), ([Q], [A, R, B], [A, R, C])),
        (preference("q", [B], [C]), ([Q], [B], [C])),
    ],
)
def test_preference(tmp_path: Path, row: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    record = one(tmp_path, Format.preference, row)
    better, worse = record.answers
    assert tuple(map(list, (record.messages, better.messages, worse.messages))) == wanted
    assert (better.value, better.margin, worse.value, worse.margin) == (1, 0, 0, 0)


def test_prompt_keeps_the_other_columns(tmp_path: Path) -> None:
    row = {"prompt": "q", "answer": 7, "data_source": "sums", "n": 10**30, "checks": [{"a": None}]}
    record = one(tmp_path, Format.prompt, row)
    assert record.messages == (Q,)
    reference = {key: row[key] for key in ("answer", "data_source", "n", "checks")}
    assert record.reference == reference and record.channel == "sums"
    import pyarrow as pa
    from pyarrow import parquet

    day = datetime.date(2024, 2, 29)
    table = pa.table({"prompt": ["q"], "day": [day], "score": [float("nan")], "ok": [True]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (found,) = Reader(str(tmp_path / "a.parquet"), format=Format.prompt)
    assert isinstance(found, Record) and found.reference == {"day": "2024-02-29", "ok": True}


# -------------------------------------------------------------------------------- bad rows

TURN = answer("x")
BAD: list[tuple[Format, Any, str, str]] = [
    # format, row, field, part of what is said
    (Format.messages, {"messages": [Q | {"content": [{"type": "image_url"}]}]},
     "messages[0].content[0].type", "is 'image_url'"),
    (Format.messages, {"messages": [TURN | {"content": None}]}, "messages[0].content", "is null"),
    (Format.messages, {"messages": [TURN | {"weight": -1}]}, "messages[0].weight", "is -1"),
    (Format.messages, {"messages": [TURN | {"weight": True}]}, "messages[0].weight", "is True"),
    (Format.messages, {"messages": [TURN | {"train": "no"}]}, "messages[0].train", "is 'no'"),
    (Format.messages, {"messages": [TURN | {"train": False, "weight": 1}]}, "messages[0].weight",
     "beside train"),
    (Format.messages, {"messages": [TURN | {"audio": "x"}]}, "messages[0].audio", "not supported"),
    (Format.messages, {"messages": [TURN | {"tool_calls": [call("f", "{")]}]},
     "messages[0].tool_calls[0].function.arguments", "not valid JSON"),
    (Format.messages, {"messages": [TURN | {"tool_calls": [call("f", '{"a":1,"a":2}')]}]},
     "messages[0].tool_calls[0].function.arguments", "'a' stands twice"),
    (Format.messages, {"messages": [TURN | {"tool_calls": [call("f", "[1]")]}]},
     "messages[0].tool_calls[0].function.arguments", "is a list"),
    (Format.messages, {"messages": [TURN | {"tool_calls": [{"function": {}}]}]},
     "messages[0].tool_calls[0].function.name", "is null"),
    (Format.messages, {"messages": [{"role": "tool", "content": {"a": 1}}]},
     "messages[0].content", "is an object"),
    (Format.messages, {"messages": [TURN], "tools": [{"type": "function"}]}, "tools[0]", "name"),
    (Format.messages, {"messages": [TURN, Q], "check": "exact"}, "check", "no assistant turn"),
    (Format.messages, {"messages": [TURN], "images": ["x"]}, "images", "'images' is not supported"),
    (Format.sharegpt, {"conversations": [{"from": "function_call", "value": "f()"}]},
     "conversations[0].value", "not valid JSON"),
    (Format.sharegpt, {"conversations": [{"from": "alien", "value": ""}]},
     "conversations[0].from", "is 'alien'"),
    (Format.sharegpt, {"conversations": [{"from": "gpt"}]}, "conversations[0]", "no key 'value'"),
    (Format.alpaca, {"instruction": "x", "output": ""}, "output", "is empty"),
    (Format.alpaca, {"instruction": "x", "output": "y", "history": [["q"]]}, "history[0]", "pair"),
    (Format.prompt_completion, {"prompt": "x", "completion": [TURN]}, "completion", "is a list"),
    (Format.prompt_completion, {"prompt": "x", "completion": ""}, "completion", "is empty"),
    (Format.prompt_completion, {"prompt": 5, "completion": "x"}, "prompt", "is a number"),
    (Format.prompt_completion, {"prompt": "x", "completion": "y", "check": "exact"}, "check",
     "prompt-completion row"),
    (Format.tokens, {"input_ids": [1, 2], "labels": [2, -100]}, "labels[0]", "token is 1"),
    (Format.tokens, {"input_ids": [1, 2], "labels": [2]}, "labels", "has 1 entries"),
    (Format.tokens, {"input_ids": [1, True]}, "input_ids[1]", "is true or false"),
    (Format.tokens, {"input_ids": [1.0]}, "input_ids[0]", "is 1.0"),
    (Format.tokens, {"input_ids": [-1]}, "input_ids[0]", "is -1"),
    (Format.tokens, {"input_ids": [2**31]}, "input_ids[0]", "is 2147483648"),
    (Format.tokens, {"input_ids": [1], "labels": [-100]}, "labels", "nothing is supervised"),
    (Format.tokens, {"input_ids": [1, 2], "attention_mask": [0, 1]}, "attention_mask", "not 1"),
    (Format.tokens, {"input_ids": [1], "completion_mask": [1]}, "completion_mask", "not supported"),
    (Format.preference, preference(None, "a", "b"), "chosen", "has no prompt"),
    (Format.preference, preference("q", "a", "a"), "rejected", "same as chosen"),
    (Format.preference, preference(None, [Q, A], [R, B]), "chosen", "has no prompt"),
    (Format.preference, preference(None, [Q, A], [Q, A, R, B]), "chosen", "no assistant turn"),
    (Format.preference, preference(None, [Q, A, Q, B], [Q, A, R, B]), "chosen", "a user turn"),
    (Format.preference, preference("other", [Q, A], [Q, B]), "prompt", "is not how"),
    (Format.preference, preference([Q, A, R], [Q, B], [Q, C]), "prompt", "is not how"),
    (Format.preference, preference("q", [A | {"weight": 1}], [B]), "chosen", "train or weight"),
    (Format.prompt, {"prompt": [Q, A]}, "prompt", "ends with an assistant turn"),
    (Format.text, {"text": "x", "check": "exact"}, "check", "this is a text row"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "field", "part"), BAD)
def test_the_bad_field_is_named(
    tmp_path: Path, format: Format, row: Any, field: str, part: str
) -> None:
    (found,) = read(tmp_path, format, row)
    assert isinstance(found, Rejected)
    assert found.field == field
    assert part in found.what and found.fix


# ------------------------------------------------------------------- channels and columns


def test_synonyms_name_the_channel_where_task_type_is_absent(tmp_path: Path) -> None:
    names = ["source", "dataset", "data_source", "channel", "task_type"]  # the last one counts
    rows = [{"text": "x"} | {name: name for name in names[:count]} for count in range(6)]
    rows.append({"text": "x", "channel": None, "source": "s"})
    records = read(tmp_path, Format.text, *rows)
    channels = [record.channel for record in records if isinstance(record, Record)]
    assert channels == ["rows", *names, "s"]


@pytest.mark.parametrize(
    "value",
    ["", " ", 3, ["x"], {"url": "x"}, True, "a\u00a0b", "a  b", " a", "a\n", "x" * 101, "\u200b",
     "https://example.org/1"],
)  # fmt: skip
def test_a_synonym_that_is_no_name_is_a_note(tmp_path: Path, value: Any) -> None:
    rows: list[Any] = [
        {"text": "x", "source": value},
        {"text": "x", "data_source": value, "dataset": value, "source": "web pages"},
        {"text": "x", "channel": "x" * 100, "source": value},
        {"text": "x", "task_type": "t", "source": value},
    ]
    records = read(tmp_path, Format.text, *rows)
    channels = [record.channel for record in records if isinstance(record, Record)]
    assert channels == ["rows", "web pages", "x" * 100, "t"]


def test_columns_are_renamed_at_once(tmp_path: Path) -> None:
    row = {"a": "q", "prompt": "swapped", "completion": "note", "kind": "sums"}
    columns = {"prompt": "a", "completion": "prompt", "task_type": "kind"}
    record = one(tmp_path, Format.auto, row, columns=columns, accepts=SFT)
    assert (record.text, record.channel) == ("qswapped", "sums")
    record = one(tmp_path, Format.prompt, {"q": "a", "n": 1}, columns={"prompt": "q"})
    assert record.reference == {"n": 1}
    (bad,) = read(tmp_path, Format.text, {"x": 1}, columns={"text": "body"})
    assert isinstance(bad, Rejected) and "has no key 'body'" in bad.what
    with pytest.raises(ConfigError, match="messages") as caught:
        read(tmp_path, Format.text, row, columns={"mesages": "a"})
    assert caught.value.where == "data.columns.mesages"


def test_a_note_near_a_key_that_is_there_is_a_note(tmp_path: Path) -> None:
    one(tmp_path, Format.preference, preference("q", "a", "b") | {"prompt_id": "7"})
    (bad,) = read(tmp_path, Format.text, {"text": "x", "task_typ": "y"})
    assert isinstance(bad, Rejected) and bad.field == "task_typ"


# ----------------------------------------------------------------------------- recognition

ROWS: dict[Format, dict[str, Any]] = {
    Format.messages: {"messages": [TURN], "prompt": "a note", "text": "the same rendered"},
    Format.sharegpt: {"conversations": [{"from": "gpt", "value": "x"}], "id": "1"},
    Format.alpaca: {"instruction": "x", "input": "", "output": "y", "text": "rendered"},
    Format.prompt_completion: {"prompt": "x", "completion": "y"},
    Format.tokens: {"input_ids": [1], "labels": [1]},
}


def recognised(folder: Path, rows: list[Any], accepts: set[Format]) -> Format:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = Reader(str(path), accepts=accepts)
    assert reader.recognised
    return reader.format


def test_a_format_is_recognised_by_its_keys(tmp_path: Path) -> None:
    for format, row in ROWS.items():
        assert recognised(tmp_path, [row], SFT) is format
    both = {"prompt": "q", "chosen": "a", "rejected": "b", "messages": [TURN]}
    assert recognised(tmp_path, [both], {Format.preference}) is Format.preference
    assert recognised(tmp_path, [both], {Format.prompt}) is Format.prompt
    assert recognised(tmp_path, [both], {Format.prompt, Format.preference}) is Format.preference
    # A few rows that do not fit are told one by one, as they are read.
    mixed = [{"text": "x"}, 5, ROWS[Format.alpaca], ROWS[Format.sharegpt], ROWS[Format.alpaca]]
    assert recognised(tmp_path, mixed, SFT) is Format.alpaca


def test_what_is_not_clear_is_asked(tmp_path: Path) -> None:
    rows = [ROWS[Format.messages], {"messages": [TURN]}]
    with pytest.raises(ConfigError, match="messages and text") as unclear:
        recognised(tmp_path, rows, {Format.messages, Format.text})
    assert unclear.value.where == "data.format"
    assert "data.format=messages or data.format=text" in unclear.value.fix
    with pytest.raises(ConfigError, match="sharegpt"):
        recognised(tmp_path, [ROWS[Format.sharegpt], ROWS[Format.alpaca]], SFT)


def test_what_does_not_fit_is_told_with_examples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="these are alpaca rows") as caught:
        recognised(tmp_path, [ROWS[Format.alpaca]], {Format.preference})
    assert caught.value.where == f"{tmp_path}/rows.jsonl:1"
    assert '"chosen"' in caught.value.fix
    with pytest.raises(DataError, match="keys: a, b"):
        recognised(tmp_path, [{"b": 1, "a": 2}], SFT)
    with pytest.raises(ConfigError, match="this objective reads alpaca, tokens") as refused:
        read(tmp_path, Format.text, {"text": "x"}, accepts={Format.tokens, Format.alpaca})
    assert refused.value.where == "data.format"


def test_only_the_first_rows_decide(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "x"}] * 100 + [{"messages": [TURN]}] * 500
    assert recognised(tmp_path, rows, {Format.messages, Format.text}) is Format.text
