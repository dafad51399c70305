"""What `datasets` writes as Json(): the same rows as from JSON lines, wherever the type stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import Format
from posttrain_dist.data.formats.records import Reader, Rejected
from posttrain_dist.data.read.containers import find_files
from posttrain_dist.data.read.json_cells import row_reader
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Record


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(folder: Path, rows: list[dict[str, Any]], features: Any = None) -> dict[str, Any]:
    """The rows as JSON lines and as tables: the path of each, by its kind; and their features."""
    import datasets

    (folder / "hub").mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixed: Any = {} if features else {"on_mixed_types": "use_json"}
    table = datasets.Dataset.from_list(rows, features=features, **mixed)
    table.to_parquet(folder / "hub" / "train.parquet")
    table.save_to_disk(folder / "saved")
    return {
        "features": table.features,
        "lines": f"{folder}/a.jsonl",
        "parquet": f"{folder}/hub/train.parquet",
        "saved": f"hf:{folder}/saved",
        "hub": f"hf:{folder}/hub",
    }


def contents(path: str, format: Format, **more: Any) -> list[dict[str, Any]]:
    """All of each Record but its place."""
    rows = list(Reader(path, format=format, **more))
    assert all(isinstance(row, Record) for row in rows), rows
    return [{name: getattr(row, name) for name in Record.__slots__ if name not in
             ("where", "channel")} for row in rows]  # fmt: skip


def tool(name: str, *parameters: str) -> dict[str, Any]:
    properties = {each: {"type": "string"} for each in parameters}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def asks(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_turns_that_differ_in_their_keys(tmp_path: Path) -> None:
    import datasets

    calls = [call("weather", city="Paris", unit=None), call("pay", amount=5)]
    rows = [
        {
            "messages": [
                asks("Paris?"),
                says("", tool_calls=calls),
                {"role": "tool", "content": "18", "tool_call_id": "1"},
                says('{"city": "é", "n": [1, 2]}', weight=0.5),
            ],
            "tools": [tool("weather", "city", "unit"), tool("pay", "amount")],
            "meta": {"scores": [1, {"a": None}]},
            "chat_template_kwargs": {"enable_thinking": False, "budget": "low"},
        },
        {
            "messages": [asks("5"), says("null", reasoning_content="so")],
            "tools": [],
            "meta": {"scores": []},
            "chat_template_kwargs": {"budget": 2, "enable_thinking": None},
        },
    ]
    at = write(tmp_path, rows)
    assert at["features"]["messages"] == datasets.List(datasets.Json())  # written unasked
    wanted = contents(at["lines"], Format.messages)
    assert wanted[0]["messages"][1]["tool_calls"] == calls
    assert wanted[0]["tools"] == tuple(rows[0]["tools"])
    assert wanted[0]["weights"] == (None, None, None, 0.5)
    assert [row["notes"] for row in wanted] == [("null_arguments",), ()]
    assert [row["variables"] for row in wanted] == [
        {"enable_thinking": False, "budget": "low"},
        {"budget": 2},
    ]
    for kind in ("parquet", "saved", "hub"):
        assert contents(at[kind], Format.messages) == wanted


def test_columns_of_json_and_of_other_names(tmp_path: Path) -> None:
    import datasets

    schema = {"role": datasets.Value("string"), "content": datasets.Json()}
    features = datasets.Features(
        {
            "dialog": datasets.List(datasets.Json()),  # messages
            "functions_": datasets.Json(),  # tools
            "q": datasets.Json(),  # prompt
            "a": datasets.List(schema),  # completion
        }
    )
    rows = [
        {
            "dialog": [asks([{"type": "text", "text": "hi"}]), says("a", train=False), says("b")],
            "functions_": [tool("f", "x"), tool("g", "y")],
            "q": [asks("5")],
            "a": [says("5"), says('[{"role": 1}, 2]'), says([{"type": "text", "text": "t"}])],
        },
        {"dialog": [says("b")], "functions_": None, "q": [asks("x")], "a": [says("x")]},
    ]
    at = write(tmp_path, rows, features)
    for format, columns in (
        (Format.messages, {"messages": "dialog", "tools": "functions_"}),
        (Format.prompt_completion, {"prompt": "q", "completion": "a"}),
        (Format.preference, {"prompt": "q", "chosen": "dialog", "rejected": "a"}),
    ):
        if format is Format.preference:  # without weights
            rows = [{**row, "dialog": [says("better")]} for row in rows]
            (tmp_path / "two").mkdir()
            at = write(tmp_path / "two", rows, features)
        wanted = contents(at["lines"], format, columns=columns)
        for kind in ("parquet", "saved"):
            assert contents(at[kind], format, columns=columns) == wanted
    # Written out, for the two could be wrong alike.
    (first, _) = contents(at["parquet"], Format.prompt_completion,
                          columns={"prompt": "q", "completion": "a"})  # fmt: skip
    said = ["5", "5", '[{"role": 1}, 2]', "t"]
    assert [turn["content"] for turn in first["messages"]] == said


def test_arguments_of_which_some_are_json(tmp_path: Path) -> None:
    """`x` is a number here and a list there, so Json(); where a call has none, it is null."""
    import datasets

    calls = [call("f", x=1, y="a"), call("f", x=[{"z": None}], y="b"), call("g", n=1)]
    rows = [{"messages": [says("", tool_calls=[each])], "tools": [tool("g", "n")]}
            for each in calls]  # fmt: skip
    text = datasets.Value("string")
    of_call = {"x": datasets.Json(), "y": text, "n": datasets.Value("int64")}
    of_tool = {"type": text, "function": {"name": text, "parameters": datasets.Json()}}
    made = {"type": text, "function": {"name": text, "arguments": of_call}}
    turn = {"role": text, "content": text, "tool_calls": datasets.List(made)}
    features = {"messages": datasets.List(turn), "tools": datasets.List(of_tool)}
    at = write(tmp_path, rows, datasets.Features(features))
    wanted = contents(at["lines"], Format.messages)
    for kind in ("parquet", "saved"):
        found = contents(at[kind], Format.messages)
        assert [row["messages"] for row in found] == [row["messages"] for row in wanted]


def test_text_that_is_json_stays_text(tmp_path: Path) -> None:
    """`datasets` stores such a text as it stands; only `"a"` cannot be told from the JSON of a."""
    import pyarrow as pa
    from pyarrow import parquet

    texts = ["5", "hello", '{"a":  1}', "null", '["x", "y"]', "hello {", "true", "[]", "é", " 1.5"]
    rows: list[dict[str, Any]] = [{"prompt": text, "completion": text} for text in texts]
    rows += [{"prompt": [asks("q")], "completion": [says("a")]}]
    at = write(tmp_path, rows)
    wanted = contents(at["lines"], Format.prompt_completion)
    assert [row["text"] for row in wanted] == [*(text + text for text in texts), None]
    for kind in ("parquet", "saved"):
        assert contents(at[kind], Format.prompt_completion) == wanted
    # Of a column of text that becomes Json(), it looks at the first five values only.
    texts = ["1", "2", "3", "4", "5", "hello {"]
    parquet.write_table(pa.table({"text": pa.array(texts, pa.json_())}), tmp_path / "b.parquet")
    assert [row["text"] for row in contents(f"{tmp_path}/b.parquet", Format.text)] == texts


def test_a_pyarrow_that_does_not_know_the_type() -> None:
    """It gives bytes, and the name of the type beside them (seen with 17.0)."""
    import pyarrow as pa

    beside = {"ARROW:extension:name": "arrow.json"}
    cell = pa.field("content", pa.binary(), metadata=beside)
    item = pa.field("item", pa.struct([("role", pa.string()), cell]))
    schema = pa.schema([pa.field("messages", pa.list_(item)), cell.with_name("tools")])
    read = row_reader(schema)
    assert read is not None and row_reader(pa.schema([("content", pa.binary())])) is None
    row = {
        "messages": [
            {"role": "user", "content": content} for content in (b'"q"', b"5", b"{", None)
        ],
        "tools": '[{"name": "é"}]'.encode(),
    }
    found = read(row)
    assert [turn["content"] for turn in found["messages"]] == ["q", "5", "{", None]
    assert found["tools"].read("tools") == [{"name": "é"}]


def test_json_that_is_not_valid_is_a_bad_row(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    texts = ['{"role": "assistant", "content": "a"}', '{"role": ', '{"role": "user", "role": "x"}']
    turns = pa.array(texts, pa.json_())
    lists = pa.ListArray.from_arrays([0, 1, 2, 3], turns)
    parquet.write_table(pa.table({"messages": lists}), tmp_path / "a.parquet")
    good, cut, twice = Reader(f"{tmp_path}/a.parquet", format=Format.messages)
    assert isinstance(good, Record) and good.messages == (says("a"),)
    assert isinstance(cut, Rejected) and isinstance(twice, Rejected)
    assert (cut.line, cut.field, twice.line, twice.field) == (2, "messages[0]", 3, "messages[0]")
    assert "messages[0] is not valid JSON" in cut.what and "'role' stands twice" in twice.what
    # A tool that does not know the type leaves the texts.
    plain = lists.cast(pa.list_(pa.string()))
    parquet.write_table(pa.table({"messages": plain}), tmp_path / "b.parquet")
    good, cut, twice = Reader(f"{tmp_path}/b.parquet", format=Format.messages)
    assert isinstance(good, Record) and good.messages == (says("a"),)
    assert isinstance(cut, Rejected) and cut.field == "messages[0]"
    assert isinstance(twice, Rejected) and "'role' stands twice" in twice.what


def test_a_saved_folder_says_under_which_name_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, [{"text": "a"}])
    with pytest.raises(DataError, match="read under another name") as caught:
        find_files(f"{tmp_path}/saved")
    assert f"write hf:{tmp_path}/saved" in caught.value.fix
