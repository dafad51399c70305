"""Keys of a row beside its conversation: its weight, and what the chat template reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import RESERVED_VARIABLES, Format, Template
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.data.formats.records import Reader, Rejected
from posttrain_dist.flow import Record
from posttrain_dist.prepare.split import content_key

ASKED = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CONVERSATIONS: dict[Format, list[dict[str, Any]]] = {
    Format.messages: [{"messages": [ASKED, SAID]}],
    Format.sharegpt: [{"conversations": SHARED}],
    Format.alpaca: [{"instruction": "q", "output": "a"}],
    Format.prompt_completion: [
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": "q", "completion": "a"},
    ],
}
OTHERS: dict[Format, dict[str, Any]] = {
    Format.text: {"text": "x"},
    Format.tokens: {"input_ids": [1, 2]},
    Format.preference: {"prompt": "q", "chosen": "a", "rejected": "b"},
    Format.ranking: {"prompt": "q", "answers": ["a", "b"]},
    Format.scored_answers: {"prompt": "q", "answers": ["a", "b"], "scores": [1, 0]},
    Format.scored_completion: {"prompt": "q", "completion": "a", "score": 1},
    Format.unpaired: {"prompt": "q", "completion": "a", "label": True},
    Format.prompt: {"prompt": "q"},
}
TRAINED = [(format, row) for format, rows in CONVERSATIONS.items() for row in rows]


def read(folder: Path, format: Format, row: dict[str, Any]) -> Record | Rejected:
    (folder / "rows.jsonl").write_text(json.dumps(row))
    (found,) = Reader(f"{folder}/rows.jsonl", format=format)
    return found


def good(folder: Path, format: Format, row: dict[str, Any]) -> Record:
    found = read(folder, format, row)
    assert isinstance(found, Record), found
    return found


def bad(folder: Path, format: Format, row: dict[str, Any]) -> Rejected:
    found = read(folder, format, row)
    assert isinstance(found, Rejected), found
    return found


# -------------------------------------------------------------------------------- the weight


@pytest.mark.parametrize(("format", "row"), TRAINED)
def test_train_and_weight_of_a_row(tmp_path: Path, format: Format, row: dict[str, Any]) -> None:
    for said, weight in (
        ({}, 1.0),
        ({"train": False}, 0.0),
        ({"train": False, "weight": 0}, 0.0),
        ({"train": True, "weight": None, "loss": None, "mask": None}, 1.0),
        ({"weight": 0.25, "loss": 1, "loss_mask": True, "trainable": 1.0, "masked": False}, 0.25),
        ({"weight": 999_999.5}, 999_999.5),
        ({"weight": "0.5", "train": "True", "loss": "1"}, 0.5),  # as CSV has it
        ({"train": "False"}, 0.0),
    ):
        assert good(tmp_path, format, row | said).weight == weight
    for said, field, part in (
        ({"train": 0}, "train", "is 0"),
        ({"train": "no"}, "train", "is 'no'"),
        ({"train": False, "weight": 2}, "weight", "beside train: false"),
        ({"weight": 1_000_000}, "weight", "is 1000000, and a weight is from 0 to below 1,000,000"),
        ({"weight": -0.5}, "weight", "is -0.5, and a weight is from 0 to below 1,000,000"),
        ({"weight": "high"}, "weight", "is 'high', expected a number"),
    ):
        found = bad(tmp_path, format, row | said)
        assert (found.field, part in found.what) == (field, True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("loss", "trainable", "loss_mask") for value in (False, 0, 0.5)),
        *((key, 0) for key in ("loss_weight", "sample_weight", "row_weight", "train_on")),
        *(("mask", value) for value in (0, 1, False, True, [1, 0])),
        ("masked", True),
        ("loss", 2.31),
        ("loss_mask", [0, 1]),
        ("train_detail", "none"),
    ],
)
def test_other_words_for_a_weight_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    for format, row in TRAINED:
        found = bad(tmp_path, format, row | {key: value})
        assert found.field == key and found.what.startswith(f"{key} is not read")
        assert '"train": false' in found.fix and '"weight"' in found.fix and "turn" in found.fix


def test_rows_that_have_no_weight(tmp_path: Path) -> None:
    for format, row in OTHERS.items():
        good(tmp_path, format, row | {"train": True})
        assert bad(tmp_path, format, row | {"train": False}).field == "train"
        neutral = {"weight": 1, "loss": True, "mask": None, "masked": 0}
        if format is not Format.prompt:
            good(tmp_path, format, row | neutral)
            for key in ("weight", "loss", "mask"):
                found = bad(tmp_path, format, row | {key: 0})
                assert found.field == key and format.name in found.fix
    reference = {"weight": 0, "mask": [1], "loss": 2.5}  # of its reward
    assert good(tmp_path, Format.prompt, OTHERS[Format.prompt] | reference).reference == reference


def test_the_limit_of_a_turn_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    for weight in (1e6, 1e300, -1, 10**30):
        row = {"messages": [ASKED, SAID | {"weight": weight}]}
        found = bad(tmp_path, Format.messages, row)
        assert found.field == "messages[1].weight"
        what = f"messages[1].weight is {weight!r}, and a weight is from 0 to below 1,000,000"
        assert (found.what, found.fix) == (what, "write a number from 0 to below 1,000,000")
    turns = [[SAID | {"weight": weight}] for weight in (float("inf"), float("nan"), 0.5)]
    parquet.write_table(pa.table({"messages": turns}), tmp_path / "a.parquet")
    infinite, null, half = Reader(f"{tmp_path}/a.parquet", format=Format.messages)
    assert isinstance(infinite, Rejected) and "is inf, and a weight is from 0" in infinite.what
    assert isinstance(null, Record) and null.weights == ()  # NaN is how pandas says null
    assert isinstance(half, Record) and half.weights == (0.5,)


def test_the_weight_of_a_row_times_those_of_its_turns(tmp_path: Path, tokenizer_of: Any) -> None:
    source = (
        "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    )
    encoder = Encoder(tokenizer_of(source), Template(), max_length=999)

    def weights(format: Format, row: dict[str, Any]) -> list[tuple[float, int]]:
        """The weights of the row's targets in order, each with its number of tokens."""
        encoded = encoder.encode(good(tmp_path, format, row))
        (example,) = encoded.examples
        assert encoded.faults == []
        found: list[tuple[float, int]] = []
        for weight in example.weight_L[example.weight_L > 0].tolist():
            same = found and found[-1][0] == weight
            found[-1:] = [(weight, found[-1][1] + 1)] if same else [*found[-1:], (weight, 1)]
        return found

    turns = [ASKED, SAID, ASKED, SAID | {"weight": 3}, ASKED, SAID | {"train": False}]
    plain = weights(Format.messages, {"messages": turns})
    assert [weight for weight, _ in plain] == [1, 3]
    times = [(0.5 * weight, count) for weight, count in plain]
    assert weights(Format.messages, {"messages": turns, "weight": 0.5}) == times
    pair = {"prompt": "q:", "completion": " an answer"}
    ((one, count),) = weights(Format.prompt_completion, pair)
    assert one == 1 and weights(Format.prompt_completion, pair | {"weight": 4}) == [(4, count)]


# ----------------------------------------------------------------------------- the variables


def test_chat_template_kwargs_are_the_variables(tmp_path: Path) -> None:
    given = {"enable_thinking": False, "day": None, "style": {"tone": "dry", "x": None}, "n": [1]}
    wanted = {"enable_thinking": False, "style": {"tone": "dry"}, "n": [1]}
    formats = [*TRAINED[:4], *((f, OTHERS[f]) for f in (Format.preference, Format.prompt))]
    for format, row in formats:
        for value in (given, json.dumps(given)):
            record = good(tmp_path, format, row | {"chat_template_kwargs": value})
            assert record.variables == wanted and record.reference == {}
        for nothing in (None, {}, "", "{}", {"day": None}, {"tools": None}):
            assert good(tmp_path, format, row | {"chat_template_kwargs": nothing}).variables == {}
        for value, part in (([1], "is a list"), (True, "is true or false"), ("{", "not valid"),
                            ("[1]", "is a list")):  # fmt: skip
            found = bad(tmp_path, format, row | {"chat_template_kwargs": value})
            assert found.field == "chat_template_kwargs" and part in found.what
            assert "enable_thinking" in found.fix


def test_variables_of_a_table(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"messages": [SAID], "chat_template_kwargs": kwargs}
            for kwargs in ({"a": 1, "b": {"c": "x"}}, {"d": [2]}, None)]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(Reader(f"{tmp_path}/a.parquet", format=Format.messages))
    assert [row.variables for row in found if isinstance(row, Record)] == [
        {"a": 1, "b": {"c": "x"}},
        {"d": [2]},
        {},
    ]
    csv = 'messages,how,weight\n"[{""role"":""assistant"",""content"":""a""}]","{""a"": 1}",0.5\n'
    (tmp_path / "a.csv").write_text(csv)
    columns = {"chat_template_kwargs": "how"}
    (row,) = Reader(f"{tmp_path}/a.csv", format=Format.messages, columns=columns)
    assert isinstance(row, Record) and (row.variables, row.weight) == ({"a": 1}, 0.5)


def test_names_that_are_no_variables(tmp_path: Path) -> None:
    assert {"messages", "tools", "add_generation_prompt", "tokenize"} <= RESERVED_VARIABLES
    for name in RESERVED_VARIABLES:
        row = {"messages": [SAID], "chat_template_kwargs": {"ok": 1, name: []}}
        found = bad(tmp_path, Format.messages, row)
        assert found.field == f"chat_template_kwargs.{name}" and "leave it out" in found.fix
    for date in ("x", 5, ""):
        row = {"messages": [SAID], "chat_template_kwargs": {"strftime_now": date}}
        found = bad(tmp_path, Format.messages, row)
        assert found.field == "chat_template_kwargs.strftime_now" and "2026-07-26" in found.fix
    for near in ("template_kwargs", "chat_template_args", "chat_template_kwarg", "template_args"):
        found = bad(tmp_path, Format.messages, {"messages": [SAID], near: {"a": 1}})
        assert found.field == near and "'chat_template_kwargs'" in found.fix


def test_rows_without_a_template_have_no_variables(tmp_path: Path) -> None:
    for format, row in (
        (Format.text, OTHERS[Format.text]),
        (Format.tokens, OTHERS[Format.tokens]),
        (Format.prompt_completion, TRAINED[4][1]),
    ):
        found = bad(tmp_path, format, row | {"chat_template_kwargs": {"a": 1}})
        assert found.field == "chat_template_kwargs"
        good(tmp_path, format, row | {"chat_template_kwargs": {}})


def test_variables_belong_to_the_content_of_a_row(tmp_path: Path) -> None:
    def key(**more: Any) -> int:
        return content_key(good(tmp_path, Format.messages, {"messages": [ASKED, SAID], **more}))

    one = key(chat_template_kwargs={"a": 1, "b": 2})
    assert one == key(chat_template_kwargs={"b": 2, "a": 1}, task_type="t", weight=0.5)
    assert len({one, key(chat_template_kwargs={"a": 1}), key()}) == 3
    # As it was before there were any, so that the same rows are held out.
    text = json.dumps([[ASKED, SAID], [], None, [], [], [], []], sort_keys=True)
    before = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    assert key() == key(chat_template_kwargs={"a": None}) == before
