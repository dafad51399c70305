"""Rows with answers, from files to the prepared folder: units, counts, sides, digests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain_dist.config import RunConfig
from posttrain_dist.data import DataConfig, LongRows, OnBadRow, Supervise, Template, answer_rules
from posttrain_dist.data.chat.rendering.served import Served
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.errors import DataError, PosttrainError
from posttrain_dist.models.folder import load_tokenizer, resolve
from posttrain_dist.objectives.base import Objective, TokenLoss
from posttrain_dist.prepare import prepare, row_encoder
from posttrain_dist.prepare.data_report import data_report
from posttrain_dist.prepare.fingerprint import fingerprint


class Pairs(TokenLoss):
    rows = "pairs"


class Labels(TokenLoss):
    rows = "labels"


class Rated(TokenLoss):
    rows = "pairs"
    own_rows = True


def config_of(folder: Path, objective: Objective, **data: Any) -> RunConfig:
    config = RunConfig(data=DataConfig(cache=str(folder / "cache"), **data))
    return dataclasses.replace(config, objective=objective)


def rows_file(folder: Path, num: int = 40) -> Path:
    """Pairs, of which the worse answer is twice as many words; every fifth has a margin."""
    path = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": f"say {i} and {i % 7}",
            "chosen": f"it is {i}",
            "rejected": f"well it is {i} it is {i}",
            "task_type": "ab"[i % 2],
            **({"margin": 0.5} if i % 5 == 0 else {}),
        }
        for i in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_units_counts_and_texts_of_pairs(tmp_path: Path) -> None:
    path = rows_file(tmp_path)
    config = config_of(tmp_path, Pairs(), train=str(path), eval_fraction=0.2)
    summary = prepare(config, tmp_path / "prepared")
    tokenizer = load_tokenizer(resolve(config.model.path))
    given = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seen, longest = [], 0
    for split in ("train", "eval"):
        examples = Examples.open(tmp_path / "prepared", split)
        lengths: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
        for unit in range(len(examples.units)):
            prompt, better, worse = (examples[i] for i in examples.units.samples(unit))
            row = given[prompt.sample_id // 3]
            assert row["task_type"] == examples.channels[prompt.channel]
            assert row["prompt"] in tokenizer.decode(prompt.input_ids_L.tolist())
            end = tokenizer.decode([summary.end_token_ids[0]])
            for answer, name in ((better, "chosen"), (worse, "rejected")):
                assert tokenizer.decode(answer.input_ids_L.tolist()) == row[name] + end
                assert answer.parent == prompt.sample_id and answer.weight_L.all()
                longest = max(longest, len(prompt.input_ids_L) + len(answer.input_ids_L))
            extra = [dict(each.extra) for each in (prompt, better, worse)]
            assert [e["role_S"] for e in extra] == [-1, 0, 0]
            assert [e["value_S"] for e in extra] == [0, 1, 0]
            assert [e["margin_S"] for e in extra] == [0, row.get("margin", 0), 0]
            lengths[row["task_type"]].append((len(better.input_ids_L), len(worse.input_ids_L)))
            seen.append(prompt.sample_id // 3)
        for channel, found in lengths.items():
            counts = summary.splits[split][channel]
            assert counts.comparisons == counts.better == counts.worse == len(found)
            assert (counts.better_tokens, counts.worse_tokens) == tuple(np.sum(found, axis=0))
            assert sum(n for _, n in counts.lengths) == counts.rows == len(found)
    assert sorted(seen) == list(range(40))  # a unit is on one side, whole
    assert summary.longest == longest  # of a path, not of a pack
    lines = (tmp_path / "prepared" / "heldout_records.jsonl").read_text(encoding="utf-8")
    texts = [json.loads(line)["messages"] for line in lines.splitlines()]
    assert len(texts) == 8
    assert all(t[1]["content"].startswith("it is") for t in texts)  # the better one
    served = Served.read(tmp_path / "prepared")
    assert served is not None and served.rows[0].prompt.messages == [
        {"role": "user", "content": given[served_row(served, given)]["prompt"]}
    ]


def served_row(served: Served, given: list[dict[str, Any]]) -> int:
    asked = served.rows[0].prompt.messages[0]["content"]
    return next(i for i, row in enumerate(given) if row["prompt"] == asked)


def test_the_report_has_prompt_and_answers_and_what_each_sample_of_the_pack_is(
    tmp_path: Path,
) -> None:
    config = config_of(tmp_path, Pairs(), train=str(rows_file(tmp_path)), max_length=128)
    prepare(config, tmp_path / "prepared")
    report = data_report(config, tmp_path / "prepared")
    assert {"common_prompt", "long_ranking"} <= {check["name"] for check in report["checks"]}
    example = report["examples"]["a"][0]
    better, worse = example["answers"]
    assert (better["value"], worse["value"], better["role"]) == (1, 0, 0)
    said = ["".join(piece[0] for piece in each["pieces"]) for each in (example, better, worse)]
    assert said[1].startswith("it is ") and said[2].startswith("well it is ")
    assert "say" in said[0] and example["supervised"] == better["tokens"] + worse["tokens"]
    units = report["batch"]["units"]
    assert len(units) == report["batch"]["samples"] and len(units) % 3 == 0
    assert [unit["follows"] for unit in units[:6]] == [None, 0, 0, None, 3, 3]
    assert [unit["value"] for unit in units[:3]] == [0, 1, 0]


def arrays_of(folder: Path) -> dict[str, Any]:
    return {path.stem: np.load(path).tolist() for path in (folder / "samples").glob("*.npy")}


def test_labels_are_the_same_however_many_rows_are_encoded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_file(tmp_path)
    found = []
    for batch, chunk in ((256, 32), (3, 5)):
        monkeypatch.setattr(row_encoder, "_BATCH_ROWS", batch)
        monkeypatch.setattr(row_encoder, "_FIRST_ROWS", chunk)
        folder = tmp_path / f"of-{batch}"
        config = config_of(folder, Labels(), train=str(path), convert_pairs=True)
        summary = prepare(config, folder / "prepared")
        found.append(arrays_of(folder / "prepared"))
        counts = summary.splits["train"]["a"]
        assert counts.comparisons == 0 and counts.better == counts.worse == counts.rows
    assert found[0] == found[1]
    assert found[0]["extra_role_S"][:6] == [-1, 0, 1, -1, 0, 1]


def test_what_decides_the_units_decides_the_folder(tmp_path: Path) -> None:
    path = str(rows_file(tmp_path))
    keys = [
        fingerprint(config_of(tmp_path, objective, train=path, **data), only_heldout=False).key
        for objective, data in (
            (Pairs(), {}),
            (Rated(), {}),
            (Labels(), {"convert_pairs": True}),
            (Pairs(), {"max_length": 99}),
        )
    ]
    assert len(set(keys)) == len(keys)


def test_too_long_rows_are_counted_and_named(tmp_path: Path) -> None:
    path = rows_file(tmp_path)
    long = {"prompt": "word " * 60, "chosen": "a", "rejected": "b", "task_type": "a"}
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(long) + "\n")
    config = config_of(tmp_path, Pairs(), train=str(path), eval_fraction=0, max_length=64)
    summary = prepare(config, tmp_path / "prepared")
    assert summary.splits["train"]["a"].dropped == 1
    (check,) = (
        check
        for check in data_report(config, tmp_path / "prepared")["checks"]
        if check["name"] == "truncated_target"
    )
    assert check["rows"] == [f"{path}:41"]


def test_where_every_row_is_too_long_the_way_out_is_one_that_answers_have(tmp_path: Path) -> None:
    path = str(rows_file(tmp_path))
    with pytest.raises(DataError, match=r"30 of 40 rows are longer than data\.max_length") as cut:
        prepare(config_of(tmp_path, Pairs(), train=path, max_length=26), tmp_path / "cut")
    with pytest.raises(PosttrainError, match="leaves its answers no room") as full:
        prepare(config_of(tmp_path, Pairs(), train=path, max_length=9), tmp_path / "full")
    for refused in (cut.value, full.value):
        assert "raise data.max_length" in str(refused) and "split" not in str(refused)


def test_rows_that_compare_nothing_are_refused_or_counted(tmp_path: Path) -> None:
    path = rows_file(tmp_path)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"prompt": "q", "chosen": "a", "rejected": "a"}) + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl:41 .*rejected is the same as chosen"):
        prepare(config_of(tmp_path, Pairs(), train=str(path)), tmp_path / "prepared")
    config = config_of(tmp_path, Pairs(), train=str(path), on_bad_row=OnBadRow.skip)
    assert prepare(config, tmp_path / "prepared").rejected == 1


@pytest.mark.parametrize(
    ("data", "supervise", "where"),
    [
        (DataConfig(long_rows=LongRows.split), Supervise.assistant, "data.long_rows"),
        (DataConfig(), Supervise.last_turn, "template.supervise"),
        (DataConfig(convert_pairs=True), Supervise.assistant, "data.convert_pairs"),
    ],
)
def test_what_answers_cannot_have_is_refused(
    data: DataConfig, supervise: Supervise, where: str
) -> None:
    rules = answer_rules(data, Template(supervise=supervise), "pairs")
    (broken,) = (rule for rule in rules if not rule.holds)
    assert broken.error().where == where and broken.error().fix
    assert all(rule.holds for rule in answer_rules(DataConfig(), Template(), "pairs"))


def test_a_margin_that_the_loss_has_no_place_for_is_refused_by_its_row(tmp_path: Path) -> None:
    class Marginless(Pairs):
        without_margin = "this loss"

    config = config_of(tmp_path, Marginless(), train=str(rows_file(tmp_path)))
    with pytest.raises(PosttrainError) as caught:
        prepare(config, tmp_path / "prepared")
    assert "pairs.jsonl:1" in str(caught.value)
    assert "has a margin, which this loss has no place for" in str(caught.value)
    skipping = dataclasses.replace(config.data, on_bad_row=OnBadRow.skip)
    config = dataclasses.replace(config, data=skipping)
    assert prepare(config, tmp_path / "prepared").rejected == 8
