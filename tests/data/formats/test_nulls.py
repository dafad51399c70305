"""Nulls that Arrow adds to tools and calls, in tables and in the JSON that is written from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import Format, Template
from posttrain_dist.data.chat.checks.check_table import CHECKS
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.data.formats.nulls import NULL_ARGUMENTS, clean_schema
from posttrain_dist.data.formats.records import Reader
from posttrain_dist.flow import Record


def tool(name: str, properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": sorted(properties)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def conversation(*calls: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    made = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": made},
    ]


def arguments(record: Record) -> list[dict[str, Any]]:
    calls = [call for turn in record.messages for call in turn.get("tool_calls", ())]
    return [call["function"]["arguments"] for call in calls]


def records(path: Path) -> list[Record]:
    rows = list(Reader(str(path), format=Format.messages))
    assert all(isinstance(row, Record) for row in rows), rows
    return rows  # type: ignore[return-value]


def lines(path: Path, *rows: dict[str, Any]) -> list[Record]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return records(path)


TEXT, WHERE = {"type": "string"}, {"type": "object", "properties": {"street": {"type": "string"}}}
WEATHER, PAY = tool("weather", {"city": TEXT, "place": WHERE}), tool("pay", {"amount": TEXT})
NOW = tool("now", {})
ROWS = [
    {"messages": conversation(("weather", {"city": "Rome", "place": {"street": "s"}}),
                              ("now", {})), "tools": [WEATHER, PAY, NOW]},
    {"messages": conversation(("pay", {"amount": "5"}), ("pay", {"amount": "6"})),
     "tools": [PAY]},
]  # fmt: skip


def test_a_table_gives_the_rows_that_were_put_in(tmp_path: Path) -> None:
    """Arrow makes one struct of all parameters, and one of all arguments."""
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    datasets.disable_progress_bars()
    table = pa.Table.from_pylist(ROWS)
    added = table.to_pylist()[1]
    assert added["tools"][0]["function"]["parameters"]["properties"]["city"] is None
    assert added["messages"][1]["tool_calls"][0]["function"]["arguments"]["place"] is None
    parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "d")
    wanted = lines(tmp_path / "a.jsonl", *ROWS)
    assert arguments(wanted[0]) == [{"city": "Rome", "place": {"street": "s"}}, {}]
    again = lines(tmp_path / "again.jsonl", *table.to_pylist())  # JSON of the table
    for rows in (records(tmp_path / "a.parquet"), again,
                 list(Reader(f"hf:{tmp_path}/d", format=Format.messages))):  # fmt: skip
        for row, want in zip(rows, wanted, strict=True):
            assert isinstance(row, Record)
            assert (row.messages, row.tools, row.notes) == (want.messages, want.tools, ())


def test_an_argument_that_is_null_by_itself_is_kept(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows: list[dict[str, Any]] = [
        {"messages": conversation(("weather", {"city": None, "place": None, "amount": None})),
         "tools": [WEATHER, PAY]},
        {"messages": conversation(("weather", {"city": "R", "place": {"street": None, "x": None}})),
         "tools": [WEATHER]},
        {"messages": conversation(("other", {"a": None, "amount": [None, {"b": None}]})),
         "tools": [PAY]},
        {"messages": conversation(("pay", {"a": None})), "tools": []},
        {"messages": conversation(("pay", {"a": None})), "tools": [PAY]},
    ]  # fmt: skip
    found = lines(tmp_path / "a.jsonl", *rows)
    assert [arguments(row)[0] for row in found] == [
        {"city": None, "place": None},
        {"city": "R", "place": {"street": None}},
        {"a": None, "amount": [None, {"b": None}]},
        {"a": None},
        {},
    ]
    assert [bool(row.notes) for row in found] == [True, True, True, True, False]
    # In a table null is an absent key, unless the tool of the call has such a parameter.
    for row in rows:
        row["messages"][1]["tool_calls"][0]["function"]["arguments"].pop("amount", None)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = records(tmp_path / "a.parquet")
    assert [arguments(row)[0] for row in found] == [
        {"city": None, "place": None},
        {"city": "R", "place": {"street": None}},
        {},
        {},
        {},
    ]
    assert [bool(row.notes) for row in found] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"type": "object", "properties": None}, {}),
        ({"type": "object"}, {}),
        (None, {}),
        ({"a": {"type": "string"}, "b": None}, {"a": None}),  # without `type: object`
        ({"anyOf": [{"properties": {"a": TEXT}}]}, {"a": None, "b": None}),  # not known
        ("as text", {"a": None, "b": None}),
    ],
)
def test_what_is_known_of_a_tool(tmp_path: Path, parameters: Any, kept: dict[str, Any]) -> None:
    tools = [{"name": "f", "parameters": parameters}]
    row = {"messages": conversation(("f", {"a": None, "b": None})), "tools": tools}
    (found,) = lines(tmp_path / "a.jsonl", row)
    assert arguments(found) == [kept] and found.notes == ((NULL_ARGUMENTS,) if kept else ())


def test_only_nulls_that_are_no_schema_go() -> None:
    described = {
        "type": "function",
        "strict": None,
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "default": None, "enum": ["a", None], "title": None},
                    "amount": None,
                    "default": None,  # a name, here
                    "properties": {"const": None, "items": {"properties": {"x": None, "y": TEXT}}},
                    "either": {"anyOf": [{"type": "null"}, {"description": None}]},
                },
                "required": ["city", "amount"],
                "$defs": {"used": TEXT, "const": None},
            },
        },
    }
    assert clean_schema(described) == {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "default": None, "enum": ["a", None]},
                    "properties": {"const": None, "items": {"properties": {"y": TEXT}}},
                    "either": {"anyOf": [{"type": "null"}, {}]},
                },
                "required": ["city", "amount"],
                "$defs": {"used": TEXT},
            },
        },
    }


def test_both_answers_of_a_preference(tmp_path: Path) -> None:
    (asked, better), (_, worse) = (
        conversation(("pay", {"amount": "1", "city": None})),
        conversation(("pay", {"amount": None, "city": None})),
    )
    row = {"prompt": [asked], "chosen": [better], "rejected": [worse], "tools": [PAY]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (found,) = Reader(f"{tmp_path}/a.jsonl", format=Format.preference)
    assert isinstance(found, Record) and found.notes == (NULL_ARGUMENTS,)
    made = [answer.messages[0]["tool_calls"][0]["function"]["arguments"]
            for answer in found.answers]  # fmt: skip
    assert made == [{"amount": "1"}, {"amount": None}]


def test_a_null_argument_is_a_warning_of_the_row(tmp_path: Path, tokenizer_of: Any) -> None:
    source = (
        "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    )
    rows = [{"messages": conversation(("f", {"a": value}))} for value in (None, "b")]
    tokenizer = tokenizer_of(source)
    encoder = Encoder(tokenizer, Template(), max_length=999)
    null, other = map(encoder.encode, lines(tmp_path / "a.jsonl", *rows))
    assert (null.faults, other.faults) == ([NULL_ARGUMENTS], [])
    (kept,) = null.examples
    assert CHECKS[NULL_ARGUMENTS].level == "warning"
    said = tokenizer.decode(kept.input_ids_L[kept.weight_L > 0])
    assert said == '{"name": "f", "arguments": {"a": null}}<|end|>'
