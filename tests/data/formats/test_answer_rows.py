"""Rows of answers: what each is worth, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import DataConfig, Format
from posttrain_dist.data.formats.records import Reader, Rejected
from posttrain_dist.data.sources import ACCEPTS, file_sets
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Message, Record


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def read(folder: Path, format: Format, row: dict[str, Any]) -> Record | Rejected:
    (folder / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (found,) = Reader(f"{folder}/rows.jsonl", format=format)
    return found


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
RANKING = {"prompt": "q", "answers": ["a", "b", "c"]}


ONE = {"prompt": "q", "completion": "a"}
THREE = RANKING | {"scores": [-1, 0.5, 7]}
SCORED = PAIR | {"score_chosen": 8.5, "score_rejected": 6}


@pytest.mark.parametrize(
    ("format", "row", "worth"),  # each answer: its text, value and margin
    [
        (Format.preference, PAIR | {"margin": 2}, ["a 1 2", "b 0 0"]),
        (Format.preference, SCORED, ["a 1 0", "b 0 0"]),  # their scale is not that of rewards
        (Format.preference, SCORED | {"margin": 0.5}, ["a 1 0.5", "b 0 0"]),
        (Format.ranking, RANKING, ["a 2 0", "b 1 0", "c 0 0"]),
        # Of two that share a rank each is better than those behind them.
        (Format.ranking, RANKING | {"ranks": [2, 1, 2]}, ["a 0 0", "b 2 0", "c 0 0"]),
        (Format.ranking, RANKING | {"ranks": [1, 1, 2]}, ["a 1 0", "b 1 0", "c 0 0"]),
        (Format.scored_answers, THREE, ["a -1 0", "b 0.5 0", "c 7 0"]),
        (Format.scored_completion, ONE | {"score": "0.25"}, ["a 0.25 0"]),
        (Format.unpaired, ONE | {"label": True}, ["a 1 0"]),
        (Format.unpaired, ONE | {"label": "False"}, ["a 0 0"]),
    ],
)
def test_what_answers_are_worth(
    tmp_path: Path, format: Format, row: dict[str, Any], worth: list[str]
) -> None:
    found = read(tmp_path, format, row | {"system": "be kind"})
    assert isinstance(found, Record), found
    assert found.messages == ({"role": "system", "content": "be kind"}, user("q"))
    found_worth = [f"{a.messages[0]['content']} {a.value:g} {a.margin:g}" for a in found.answers]
    assert found_worth == worth
    assert all(a.messages[0]["role"] == "assistant" for a in found.answers)


def test_one_text_of_a_whole_conversation_is_taken_apart(tmp_path: Path) -> None:
    """As HH-RLHF writes it."""
    begin = "\n\nHuman: hi: you\n\nAssistant: Human: no\n\nHuman: why?\n\nAssistant:"
    row = {"chosen": f"{begin} so\n\nit is", "rejected": f"{begin} go away"}
    found = read(tmp_path, Format.preference, row)
    assert isinstance(found, Record), found
    assert found.messages == (user("hi: you"), said("Human: no"), user("why?"))
    assert [a.messages for a in found.answers] == [(said("so\n\nit is"),), (said("go away"),)]


def test_answers_may_repeat_the_prompt(tmp_path: Path) -> None:
    row = {"prompt": [user("q")], "answers": [[user("q"), said("a")], [said("b")]]}
    found = read(tmp_path, Format.ranking, row)
    assert isinstance(found, Record), found
    assert [a.messages for a in found.answers] == [(said("a"),), (said("b"),)]


BAD: list[tuple[Format, dict[str, Any], str, str]] = [
    (Format.preference, PAIR | {"rejected": ""}, "rejected", "is empty"),
    (Format.preference, PAIR | {"chosen": [said(" ")]}, "chosen", "empty answer"),
    (Format.preference, PAIR | {"chosen": [said("x"), user("y")]}, "chosen", "ends with a user"),
    (Format.preference, PAIR | {"rejected": None}, "rejected", "expected text or a list of turns"),
    (Format.preference, PAIR | {"margin": -1}, "margin", "is -1"),
    (Format.preference, PAIR | {"margin": "wide"}, "margin", "is text"),
    (Format.preference, PAIR | {"weight": 2}, "weight", "is not read"),
    (Format.preference, PAIR | {"prompt": [{"role": "system", "content": "x"}, user("q")],
                                "system": "y"}, "system", "beside a system turn"),
    (Format.ranking, RANKING | {"answers": ["a"]}, "answers", "has 1 answer"),
    (Format.ranking, RANKING | {"answers": ["a", "b", "a"]}, "answers[2]", "same as answers[0]"),
    (Format.ranking, RANKING | {"answers": [said("a"), said("b")]}, "answers", "one list of turns"),
    (Format.ranking, RANKING | {"answers": [{"response": "x"}]}, "answers[0]", "is an object"),
    (Format.ranking, RANKING | {"ranks": [1, 2]}, "ranks", "has 2 numbers, and there are 3"),
    (Format.ranking, RANKING | {"ranks": [1, 1, 1]}, "ranks", "all the same"),
    (Format.scored_answers, RANKING | {"scores": [1, None, 2]}, "scores[1]", "is null"),
    (Format.scored_completion, ONE | {"score": True}, "score", "is true or false"),
    (Format.scored_completion, ONE | {"score": 10**400}, "score", "is 1000"),
    (Format.unpaired, ONE | {"label": -1}, "label", "is -1"),
    (Format.unpaired, ONE | {"label": None}, "label", "is None"),
    (Format.unpaired, ONE | {"label": True, "completion": "  "}, "completion", "empty answer"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "field", "part"), BAD)
def test_the_bad_field_is_named(
    tmp_path: Path, format: Format, row: dict[str, Any], field: str, part: str
) -> None:
    found = read(tmp_path, format, row)
    assert isinstance(found, Rejected), found
    assert found.field == field and part in found.what and found.fix


# ------------------------------------------------------------------- which objective reads what


@pytest.mark.parametrize(
    ("rows", "row", "what", "fix"),
    [
        ("pairs", ONE | {"label": True}, "these are unpaired rows", "objective=kto"),
        ("labels", PAIR, "these are preference rows", "data.convert_pairs=true"),
        ("scores", PAIR, "these are preference rows", "data.convert_pairs=true"),
        ("messages", PAIR, "these are preference rows", "objective=dpo"),
        ("pairs", {"messages": [user("q"), said("a")]}, "these are messages rows", "objective=sft"),
        ("scores", {"prompt": "q", "response": "a", "helpfulness": 3}, "these are prompt rows",
         "'data.columns={completion: response, score: helpfulness}'"),
        ("pairs", {"instruction": "q", "completions": ["a", "b"]}, "no known format",
         "'data.columns={prompt: instruction, answers: completions}'"),
    ],
)  # fmt: skip
def test_rows_of_other_objectives_name_the_first_row_and_the_way_out(
    tmp_path: Path, rows: str, row: dict[str, Any], what: str, fix: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=what) as refused:
        Reader(str(path), accepts=ACCEPTS[rows])
    assert refused.value.where == f"{path}:1" and fix in refused.value.fix


def test_pairs_are_converted_on_request(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR), encoding="utf-8")
    data = DataConfig(train=str(path), convert_pairs=True)
    (given,) = file_sets(data, "labels")
    (found,) = given.reader(data, "labels")
    assert isinstance(found, Record) and [a.value for a in found.answers] == [1, 0]
    (given,) = file_sets(data, "pairs")  # which is refused by the rules, and changes nothing
    assert not given.converts
