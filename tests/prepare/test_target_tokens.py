"""What training has to know of the tokenizer: special tokens with a loss, and what ends turns."""

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
from posttrain_dist.prepare.summarise import end_tokens


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
    assert made.end_token_ids == [tokenizer.convert_tokens_to_ids("<|end|>")]
    assert made.special_tokens[made.end_token_ids[0]] == "end"
    # JSON has no integer keys.
    assert Summary.read(tmp_path / "p").special_tokens == made.special_tokens


def test_rows_of_text_have_no_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve("tiny_base"))
    config = config_of(tmp_path, [{"text": "some words"}], objective=Pretrain())
    made = prepare(config, tmp_path / "p")
    assert made.special_tokens == special_tokens(tokenizer, "")
    assert made.end_token_ids == [tokenizer.eos_token_id]


def test_the_template_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    plain = template_choice.ChatTemplate

    class Counted(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            loaded.append("once")
            super().__init__(*args, **options)

    monkeypatch.setattr(template_choice, "ChatTemplate", Counted)
    prepare(config_of(tmp_path, [chat("a"), chat("b")]), tmp_path / "p")
    assert fingerprint.load_templates is template_choice.load_templates
    assert loaded == ["once"]


ADDED = {7: "<end>", 8: "<call>", 9: "<x>", 5: "</think>"}


def end_tokens_of(folder: Path, samples: list[tuple[list[int], bool]]) -> list[int]:
    """Of samples (tokens, negative ones are no targets; whether it was cut)."""
    added = [{"id": token, "content": name} for token, name in ADDED.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
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
    with SplitWriter(folder / "samples") as writer:
        writer.append(flatten(examples))
    return end_tokens(Examples.open(folder, "all", ["c"]), folder)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        # Most end in 7, which is an added token; what is cut has lost its end.
        ([([1, 2, 7], False), ([1, 7], False), ([1, 9], False)], [7]),
        ([([1, 2, 7], False), ([1, 9], True), ([1, 9], True)], [7]),
        ([([1, 2], False), ([3, 2], False), ([1, 7], False)], []),  # 2 is a plain token
        ([([1, 7, -9], False)], [7]),  # the last target counts, not the last token
        # A call and then an answer; what is cut behind a whole turn has that one's end.
        ([([1, 2, 8, -3, 2, 7], False)] * 2 + [([1, 2, 7], False)], [7, 8]),
        ([([1, 2, 8, -3, 2, 7], True)] * 2, [8]),
        ([([1, 2, 5, -3, 2, 7], False)] * 3, [7]),  # what closes a thought ends no turn
        ([([1, 7], False)] * 99 + [([1, 9], False)], [7]),  # an accident
        ([], []),
    ],
)
def test_the_end_tokens_by_hand(
    tmp_path: Path, samples: list[tuple[list[int], bool]], expected: list[int]
) -> None:
    assert end_tokens_of(tmp_path, samples) == expected


def test_samples_from_all_over_the_split_decide(tmp_path: Path) -> None:
    ends = [7] * 700 + [8] * 300  # as from a second file
    assert end_tokens_of(tmp_path, [([1, end], False) for end in ends]) == [7, 8]


def test_a_run_that_was_begun_reads_the_summary_of_then(tmp_path: Path) -> None:
    prepare(config_of(tmp_path, [chat("a"), chat("b")]), tmp_path / "p")
    file = tmp_path / "p" / "summary.json"
    values = json.loads(file.read_text())
    del values["end_token_ids"]
    file.unlink()  # not the one of the cache
    file.write_text(json.dumps({**values, "end_token_id": 3}))
    assert Summary.read(tmp_path / "p").end_token_ids == [3]
    file.write_text(json.dumps({**values, "end_token_id": None}))
    assert Summary.read(tmp_path / "p").end_token_ids == []
