"""What training has to know of the tokenizer: special tokens with a loss, and the end token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, complete
from posttrain_dist.data.chat.rendering import template_choice
from posttrain_dist.data.prepared.arrays import Examples, SplitWriter, flatten
from posttrain_dist.data.prepared.summary import Summary
from posttrain_dist.flow import Example
from posttrain_dist.metrics.watched_tokens import special_tokens
from posttrain_dist.models.folder import load_tokenizer, resolve
from posttrain_dist.objectives.pretrain import Pretrain
from posttrain_dist.prepare import fingerprint, prepare
from posttrain_dist.prepare.summarise import end_token


def config_of(tmp_path: Path, rows: list[dict[str, Any]], **values: Any) -> RunConfig:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=str(file), eval_fraction=0.0, cache=str(tmp_path / "cache"))
    return complete(RunConfig(model=ModelConfig(path="tiny_base"), data=data, **values))


def chat(answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def test_a_prepared_folder_holds_what_the_tokenizer_and_the_template_say(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve("tiny_base"))
    made = prepare(config_of(tmp_path, [chat("a"), chat("b")]), tmp_path / "p")
    assert made.special_tokens == special_tokens(tokenizer, tokenizer.chat_template)
    assert made.end_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert made.special_tokens[made.end_token_id] == "end"
    # JSON has no integer keys.
    assert Summary.read(tmp_path / "p").special_tokens == made.special_tokens


def test_rows_of_text_have_no_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve("tiny_base"))
    config = config_of(tmp_path, [{"text": "some words"}], objective=Pretrain())
    made = prepare(config, tmp_path / "p")
    assert made.special_tokens == special_tokens(tokenizer, "")
    assert made.end_token_id == tokenizer.eos_token_id


def test_the_template_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    plain = template_choice.ChatTemplate

    class Counted(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            loaded.append("once")
            super().__init__(*args)

    monkeypatch.setattr(template_choice, "ChatTemplate", Counted)
    prepare(config_of(tmp_path, [chat("a"), chat("b")]), tmp_path / "p")
    assert fingerprint.load_templates is template_choice.load_templates
    assert loaded == ["once"]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        # Most end in 7, which is an added token; what is cut has lost its end.
        ([([1, 2, 7], False), ([1, 7], False), ([1, 9], False)], 7),
        ([([1, 2, 7], False), ([1, 9], True), ([1, 9], True)], 7),
        ([([1, 2], False), ([3, 2], False), ([1, 7], False)], None),  # 2 is a plain token
        ([([1, 7, -9], False)], 7),  # the last target counts, not the last token
        ([], None),
    ],
)
def test_the_end_token_by_hand(
    tmp_path: Path, samples: list[tuple[list[int], bool]], expected: int | None
) -> None:
    added = {"added_tokens": [{"id": 7, "content": "<end>"}, {"id": 9, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(added))
    examples = [
        Example(
            np.abs(np.array(ids, np.int32)),
            np.array([0.0] + [float(i >= 0) for i in ids[1:]], np.float32),
            channel=0,
            sample_id=i,
            truncated=truncated,
        )
        for i, (ids, truncated) in enumerate(samples)
    ]
    with SplitWriter(tmp_path / "samples") as writer:
        writer.append(flatten(examples))
    assert end_token(Examples.open(tmp_path, "all", ["c"]), tmp_path) == expected


def test_the_first_two_hundred_samples_decide(tmp_path: Path) -> None:
    added = {"added_tokens": [{"id": 7, "content": "<end>"}, {"id": 9, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(added))
    ends = [7] * 200 + [9] * 300
    weight_L = np.array([0, 1], np.float32)
    examples = [Example(np.array([1, end], np.int32), weight_L, 0, i) for i, end in enumerate(ends)]
    with SplitWriter(tmp_path / "samples") as writer:
        writer.append(flatten(examples))
    assert end_token(Examples.open(tmp_path, "all", ["c"]), tmp_path) == 7
