"""Files to prepared folder: counts, the split, atomicity, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain_dist.config import RunConfig, complete
from posttrain_dist.data import DataConfig, LongRows
from posttrain_dist.data.embedded import split_path
from posttrain_dist.data.formats.records import read_records
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.data.prepared.summary import Summary
from posttrain_dist.errors import ConfigError, DataError, ModelError, PosttrainError
from posttrain_dist.flow import Record
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.folder import load_tokenizer
from posttrain_dist.objectives.pretrain import Pretrain
from posttrain_dist.prepare import prepare
from posttrain_dist.prepare.data_report import data_report
from posttrain_dist.prepare.split import content_key, draw_many, draw_one, split_off


@pytest.fixture
def make(tiny_llama: Path, rows_file: Path) -> Any:
    def build(**data: Any) -> RunConfig:
        values = {"train": str(rows_file), "max_length": 64, "eval_fraction": 0.1, **data}
        return complete(
            RunConfig(model=ModelConfig(path=str(tiny_llama)), data=DataConfig(**values))
        )

    return build


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(("bad", "told"), [(50, "50 rows, first"), (150, "100 or more rows")])
def test_rows_with_one_fault_are_counted_to_the_end(
    make: Any, builders: Any, tmp_path: Path, bad: int, told: str
) -> None:
    """All 50 stand in one chunk; of more than 100 only the first are kept."""
    data = tmp_path / "rows.jsonl"
    builders.write(data, [*builders.rows(9), *[{"messages": []}] * bad])
    with pytest.raises(DataError, match=told):
        prepare(make(train=str(data)), tmp_path / "prepared")


def test_answers_that_are_all_empty_are_a_wrong_column(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    rows = [builders.chat(f"ask {i}", "", "t") for i in range(12)]
    data = builders.write(tmp_path / "rows.jsonl", rows)
    config = make(train=str(data), eval_fraction=0)
    with pytest.raises(DataError, match=r"12 of 12 rows fail the check 'empty_turn'") as caught:
        prepare(config, tmp_path / "prepared")
    assert "data.columns" in caught.value.fix and "template.strict=false" in caught.value.fix
    builders.write(data, [*rows, builders.chat("ask", "answer", "t")])  # one that speaks
    assert prepare(config, tmp_path / "prepared").splits["train"]["t"].rows == 13


def test_every_row_arrives_with_its_mask(make: Any, rows_file: Path, tmp_path: Path) -> None:
    config = make()
    folder = tmp_path / "prepared"
    summary = prepare(config, folder)
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    tokenizer = load_tokenizer(Path(config.model.path))
    seen = []
    for split in ("train", "eval"):
        examples = Examples.open(folder, split)
        assert examples.channels == summary.channels == ["copy", "reverse", "upper"]
        for example in (examples[i] for i in range(len(examples))):
            row = rows[example.sample_id]
            user, assistant = (message["content"] for message in row["messages"])
            assert examples.channels[example.channel] == row["task_type"]
            assert tokenizer.decode(example.input_ids_L) == (
                f"<|user|>{user}<|end|><|assistant|>{assistant}<|end|>"
            )
            targets = example.input_ids_L[example.weight_L > 0]
            assert tokenizer.decode(targets) == assistant + "<|end|>"
            seen.append(example.sample_id)
        counts = summary.splits[split].values()
        assert sum(c.rows for c in counts) == len(examples)
        assert sum(c.tokens for c in counts) == examples.lengths.sum()
    assert sorted(seen) == list(range(len(rows)))
    assert {c.rows for c in summary.splits["eval"].values()} == {3}  # a tenth of 30
    kept = [rows[Examples.open(folder, "eval")[i].sample_id] for i in range(9)]
    written = read_records(str(folder / "heldout_records.jsonl"), "messages")
    assert [list(record.messages) for record in written] == [row["messages"] for row in kept]
    assert [record.channel for record in written] == [row["task_type"] for row in kept]
    digest = hashlib.sha256(rows_file.read_bytes()).hexdigest()
    assert digest in summary.inputs["data"]["train"].values()


def no_encoder(*_: Any, **__: Any) -> None:
    raise AssertionError("a row is encoded")


def test_a_killed_preparation_leaves_nothing_behind(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(make(), tmp_path / "whole")
    folder = tmp_path / "prepared"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(make(), folder)
    assert not folder.exists()
    half = tmp_path / "prepared.partial" / "samples" / "tokens.npy"
    half.parent.mkdir(parents=True)  # what a kill leaves
    half.write_bytes(b"half")
    prepare(make(), folder)
    assert files(folder) == files(tmp_path / "whole")  # and the same bytes every time
    assert not (tmp_path / "prepared.partial").exists()


def test_a_second_call_uses_what_is_there(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "prepared"
    first = prepare(make(), folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr("posttrain_dist.prepare.row_encoder.Encoder", no_encoder)
    assert prepare(make(), folder) == first == Summary.read(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    # Another run takes it from the cache, without a copy; the cache may then be emptied.
    assert prepare(make(), tmp_path / "other") == first
    tokens = [name / "samples" / "tokens.npy" for name in (folder, tmp_path / "other")]
    assert tokens[0].samefile(tokens[1])
    with pytest.raises(AssertionError, match="a row is encoded"):
        prepare(make(cache=str(tmp_path / "empty")), tmp_path / "third")
    assert not list((tmp_path / "empty").glob("*/summary.json"))


def test_changed_input_under_a_prepared_folder_is_refused(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    folder, data = tmp_path / "prepared", tmp_path / "rows.jsonl"
    builders.write(data, builders.rows(9))
    prepare(make(train=str(data)), folder)
    with pytest.raises(DataError, match="other input: max_length changed"):
        prepare(make(train=str(data), max_length=63), folder)
    builders.write(data, builders.rows(9, seed=1))
    with pytest.raises(DataError, match="other input: data changed"):
        prepare(make(train=str(data)), folder)
    (folder / "summary.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        prepare(make(train=str(data)), folder)


def test_no_row_is_trained_on_and_held_out(make: Any, builders: Any, tmp_path: Path) -> None:
    rows = builders.rows(30)
    rows += [{**rows[i], "task_type": "other"} for i in range(5)]  # same text, other channel
    data = builders.write(tmp_path / "rows.jsonl", rows)
    for seed in range(5):
        folder = tmp_path / f"prepared{seed}"
        prepare(dataclasses.replace(make(train=str(data), eval_fraction=0.5), seed=seed), folder)
        texts = {
            split: {
                json.dumps(rows[e.sample_id]["messages"])
                for e in map(examples.__getitem__, range(len(examples)))
            }
            for split in ("train", "eval")
            for examples in [Examples.open(folder, split)]
        }
        assert texts["train"] and texts["eval"]
        assert not texts["train"] & texts["eval"]


def test_eval_rows_that_stand_in_train_are_left_out(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    rows = builders.rows(12)
    train = builders.write(tmp_path / "train.jsonl", rows[:9])
    new = builders.chat("q", "a", "zeta")
    heldout = builders.write(tmp_path / "eval.jsonl", [*rows[6:], new])
    summary = prepare(make(train=str(train), eval=str(heldout)), tmp_path / "prepared")
    examples = Examples.open(tmp_path / "prepared", "eval")
    assert [examples[i].sample_id for i in range(len(examples))] == [
        12,
        13,
        14,
        15,
    ]  # counted on from the nine of train
    assert summary.duplicates_moved == 3
    assert summary.channels == ["copy", "reverse", "upper", "zeta"]  # one is held-out only
    with pytest.raises(DataError, match="every held-out row"):
        prepare(make(train=str(train), eval=str(train)), tmp_path / "again")


def test_only_held_out_rows(make: Any, builders: Any, tmp_path: Path) -> None:
    rows = builders.rows(12)
    heldout = builders.write(tmp_path / "eval.jsonl", rows)
    config = make(train=str(tmp_path / "not there"), eval=str(heldout))
    summary = prepare(config, tmp_path / "file", only_heldout=True)
    assert summary.splits["train"] == {}
    assert len(Examples.open(tmp_path / "file", "train")) == 0
    examples = Examples.open(tmp_path / "file", "eval")
    assert examples.sample_ids.tolist() == list(range(12))

    # Split off: the rows that a training would hold out.
    prepare(make(train=str(heldout), eval_fraction=0.5), tmp_path / "trained")
    prepare(make(train=str(heldout), eval_fraction=0.5), tmp_path / "split", only_heldout=True)
    ids = [Examples.open(tmp_path / name, "eval").sample_ids for name in ("trained", "split")]
    assert 0 < len(ids[0]) < 12 and ids[0].tolist() == ids[1].tolist()
    assert len(Examples.open(tmp_path / "split", "train")) == 0
    with pytest.raises(DataError, match=r"data\.eval: there is no held-out row"):
        prepare(make(train=str(heldout), eval_fraction=0), tmp_path / "none", only_heldout=True)


def rows_of(sizes: dict[str, int]) -> tuple[Any, Any]:
    """(channel, key) of rows that all differ."""
    import numpy as np

    channels = np.repeat(np.arange(len(sizes)), list(sizes.values()))
    keys = [content_key(Record(channel="", where="", text=f"{i}")) for i in range(len(channels))]
    return channels, np.array(keys, np.uint64)


def test_every_channel_gives_and_keeps_a_row() -> None:
    channels, keys = rows_of({"one": 1, "two": 2, "big": 100})
    split = split_off(channels, keys, 0.04, seed=0)
    count = lambda rows: [int((channels[rows] == i).sum()) for i in range(3)]  # noqa: E731
    assert count(split.heldout_R) == [0, 1, 4]
    assert count(split.train_R) == [1, 1, 96]
    assert split.moved == 0
    assert not split_off(channels, keys, 0.0, seed=0).heldout_R.any()


def test_the_split_depends_on_the_seed_and_on_its_own_channel_only() -> None:
    channels, keys = rows_of({"big": 100, "new": 50})

    def held(rows: int, seed: int) -> list[bool]:
        split = split_off(channels[:rows], keys[:rows], 0.1, seed)
        return list(split.heldout_R[:100])

    assert held(100, 1) == held(150, 1)
    assert held(100, 1) != held(100, 2)
    assert sum(held(100, 1)) == 10


def test_content_key_tells_rows_apart_by_what_they_say() -> None:
    a = Record(channel="x", where="1", text="a")
    assert content_key(a) == content_key(Record(channel="y", where="2", text="a"))
    messages = ({"role": "user", "content": "a"},)
    assert content_key(a) != content_key(Record(channel="x", where="1", messages=messages))


def test_cut_rows_are_counted_and_those_left_with_nothing_dropped(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    rows = [builders.chat("q" * n, "answer", "t") for n in (1, 22, 60, 70)]
    data = builders.write(tmp_path / "rows.jsonl", rows)
    config = make(train=str(data), max_length=26, eval_fraction=0)
    # The second row keeps a part of its answer, but not its end token.
    what = "3 of 4 rows are longer than data.max_length=26, and 1 of them lose their end of turn"
    with pytest.raises(DataError, match=what) as caught:
        prepare(config, tmp_path / "p")
    assert caught.value.where == f"{data}:2"
    assert caught.value.fix.startswith("set data.long_rows=drop (leaves such rows out) or split (")
    assert not (tmp_path / "p").exists()
    config.template.strict = False
    summary = prepare(config, tmp_path / "p")
    counts = summary.splits["train"]["t"]
    assert (counts.rows, counts.truncated, counts.dropped) == (4, 3, 2)
    examples = Examples.open(tmp_path / "p", "train")
    assert examples.lengths.tolist() == [10, 26]
    assert [examples[i].truncated for i in range(2)] == [False, True]
    assert counts.tokens == examples.lengths.sum()
    report = data_report(config, tmp_path / "p")
    failed = {check["name"]: check["rows"] for check in report["checks"] if check["failed"]}
    assert failed == {
        "end_of_turn": [f"{data}:2"],
        "truncated_target": [f"{data}:3", f"{data}:4"],
    }


def test_a_channel_of_long_rows_alone_says_what_left_them_out(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    rows = [builders.chat("q" * 60, "answer", "long"), builders.chat("q", "a", "short")]
    data = builders.write(tmp_path / "rows.jsonl", rows)
    config = make(train=str(data), max_length=26, eval_fraction=0, long_rows=LongRows.drop)
    with pytest.raises(DataError) as caught:
        prepare(config, tmp_path / "p")
    assert str(caught.value) == (
        f"{data}:1: channel 'long' has no supervised token in 1 rows: data.long_rows=drop leaves "
        "out 1 above data.max_length=26\n"
        "  fix: set data.long_rows=split, raise data.max_length or leave the channel out"
    )


def test_a_channel_with_no_supervised_token_names_its_rows(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    rows = [builders.chat("q", "a", "fine"), builders.chat("q" * 90, "b", "lost")]
    data = builders.write(tmp_path / "rows.jsonl", [*rows, rows[0] | {"task_type": "more"}])
    with pytest.raises(DataError, match="channel 'lost' has no supervised token") as caught:
        prepare(make(train=str(data), eval_fraction=0), tmp_path / "p")
    assert caught.value.where == f"{data}:2"
    assert "data.max_length=64" in str(caught.value)


def test_rows_that_do_not_fit_the_model_are_refused(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    rows = [
        builders.chat(" ".join(random.Random(i).choices("abcdef", k=300)), "a", "t") for i in (1, 2)
    ]
    data = builders.write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match=r"data\.max_length.*256 positions"):
        prepare(make(train=str(data), max_length=5000, eval_fraction=0), tmp_path / "p")
    other = builders.model(tmp_path / "small_vocabulary", vocab_size=100)
    config = make()
    config.model.path = str(other)
    with pytest.raises(ModelError, match="vocab_size is 100"):
        prepare(config, tmp_path / "p")


def test_text_rows(make: Any, builders: Any, tmp_path: Path) -> None:
    data = builders.write(tmp_path / "docs.jsonl", [{"text": f"the fox {i}"} for i in range(10)])
    config = dataclasses.replace(make(train=str(data)), objective=Pretrain())
    summary = prepare(config, tmp_path / "p")
    counts = [summary.splits[split]["docs"] for split in ("train", "eval")]
    assert [c.rows for c in counts] == [9, 1]
    assert all(c.supervised == c.tokens - c.rows for c in counts)
    assert read_records(str(tmp_path / "p" / "heldout_records.jsonl"), "text")[0].channel == "docs"
    with pytest.raises(ConfigError, match="embedded data holds conversations"):
        prepare(dataclasses.replace(make(train="embedded"), objective=Pretrain()), tmp_path / "q")


def test_the_embedded_data_set_has_its_own_heldout_rows(make: Any, tmp_path: Path) -> None:
    summary = prepare(make(train="embedded", max_length=256), tmp_path / "p")
    assert len(summary.channels) >= 5
    rows = {split: sum(c.rows for c in counts.values()) for split, counts in summary.splits.items()}
    lines = {
        split: len(split_path(name).read_bytes().splitlines())
        for split, name in (("train", "train"), ("eval", "heldout"))
    }
    assert rows == lines  # none was split off, none stands in both
    assert summary.splits["train"].keys() == summary.splits["eval"].keys()


def test_faults_of_rows_come_before_anything_is_written(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{\n')
    with pytest.raises(PosttrainError) as caught:
        prepare(make(train=str(data)), tmp_path / "p")
    assert f"{data}:1 " in str(caught.value) and f"{data}:2 " in str(caught.value)
    assert not (tmp_path / "p").exists()


def test_the_report_marks_exactly_the_supervised_text(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    rows = [builders.chat("ask", "say this", "t"), builders.chat("hm", "wéll", "u")]
    data = builders.write(tmp_path / "rows.jsonl", rows)
    config = make(train=str(data), eval_fraction=0)
    prepare(config, tmp_path / "p")
    report = data_report(config, tmp_path / "p")

    def text(pieces: list[Any], learned: bool) -> str:
        return "".join(piece[0] for piece in pieces if bool(piece[1]) is learned)

    shown = report["examples"]
    assert [shown[channel][0]["where"] for channel in "tu"] == [f"{data}:1", f"{data}:2"]
    assert text(shown["t"][0]["pieces"], True) == "say this<|end|>"
    assert text(shown["t"][0]["pieces"], False) == "<|user|>ask<|end|><|assistant|>"
    assert text(shown["u"][0]["pieces"], True) == "wéll<|end|>"  # a character of two tokens
    batch = report["batch"]
    assert batch["samples"] == 2
    assert text(batch["pieces"], True) in (
        "say this<|end|>wéll<|end|>",
        "wéll<|end|>say this<|end|>",
    )
    assert {piece[3] for piece in batch["pieces"]} == {0, 1}


def test_rows_are_drawn_alike_alone_and_together() -> None:
    keys = np.random.default_rng(0).integers(0, 1 << 64, 200, np.uint64)
    for seed in (0, 7, 2**31):
        assert draw_many(keys, seed).tolist() == [draw_one(key, seed) for key in keys.tolist()]
