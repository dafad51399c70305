"""Keys of a turn: which are read, which are notes, which would change what is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import Format
from posttrain_dist.data.formats.records import Reader, Rejected
from posttrain_dist.flow import Record

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def read(folder: Path, *turns: dict[str, Any]) -> Record | Rejected:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    (row,) = Reader(str(path), format=Format.messages)
    return row


def messages(folder: Path, *turns: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    row = read(folder, *turns)
    assert isinstance(row, Record), row
    return row.messages


def test_notes_of_a_turn_are_ignored(tmp_path: Path) -> None:
    notes = {  # of WildChat, LMSYS, OpenAI, Open Assistant and ShareGPT dumps
        "hashed_ip": "x", "country": "Peru", "toxic": False, "redacted": True, "state": "CA",
        "timestamp": 7, "header": {"user-agent": "x"}, "turn_identifier": 3, "language": "English",
        "refusal": "no", "annotations": [1], "finish_reason": "stop", "model": "m", "id": "1",
        "openai_moderation": [{"flagged": False}], "text": "a", "markdown": "a", "rating": 5,
        "reasoning_details": [{"text": "t"}], "contents": "the content, again", "game": 1,
    }  # fmt: skip
    assert messages(tmp_path, USER | notes, ANSWER | notes) == (USER, ANSWER)


def test_nulls_are_absent_keys(tmp_path: Path) -> None:
    keys = ("refusal", "audio", "images", "function_call", "tool_calls", "name", "train", "weight",
            "thinking", "from", "value")  # fmt: skip
    assert messages(tmp_path, USER | dict.fromkeys(keys), ANSWER) == (USER, ANSWER)
    shared = {"role": None, "content": None, "from": "gpt", "value": "a"}
    assert messages(tmp_path, shared) == (ANSWER,)


@pytest.mark.parametrize(
    ("thoughts", "wanted"),
    [
        ({"reasoning_content": "c", "reasoning": "r", "thinking": "t"}, "c"),
        ({"reasoning_content": None, "reasoning": "r"}, "r"),
        ({"reasoning_content": "", "thinking": "t"}, "t"),
        ({"reasoning": {"effort": "high"}, "thinking": "t"}, "t"),
        ({"thinking": True}, None),
    ],
)
def test_thoughts_have_three_names(tmp_path: Path, thoughts: Any, wanted: str | None) -> None:
    found = messages(tmp_path, USER | {"thinking": "a note"}, ANSWER | thoughts)
    assert found == (USER, ANSWER | ({"reasoning_content": wanted} if wanted else {}))


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        *((key, ["x"], "is not supported") for key in ("images", "audio", "video", "tools")),
        *((key, False, "is not supported") for key in ("loss", "mask", "trainable")),
        ("thoughts", "t", "is not supported"),
        ("tool_call", [{}], "'tool_calls'"),
        ("trian", False, "'train'"),
        ("weigth", 0.5, "'weight'"),
        ("weights", 0.5, "'weight'"),
        ("reasoning_contents", "t", "'reasoning_content'"),
    ],
)
def test_keys_that_would_change_what_is_trained(
    tmp_path: Path, key: str, value: Any, part: str
) -> None:
    bad = read(tmp_path, USER, ANSWER | {key: value})
    assert isinstance(bad, Rejected) and bad.field == f"messages[1].{key}"
    assert part in bad.what + bad.fix


def test_the_first_refused_key_is_named_in_every_run(tmp_path: Path) -> None:
    """The order of sets differs from run to run."""
    keys = ["videos", "audio", "weigth", "images", "loss", "tool_call", "mask"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [ANSWER | dict.fromkeys(keys, "x")]}))
    program = (
        "import sys; from posttrain_dist.data import Format;"
        "from posttrain_dist.data.formats.records import Reader;"
        "print(next(iter(Reader(sys.argv[1], format=Format.messages))).field)"
    )
    for seed in ("1", "2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", program, path],
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == "messages[0].videos", done.stderr
