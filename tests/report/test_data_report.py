"""The dict of data_report.json: every key of it, for one run whose rows are counted by hand."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain_dist.build import make_source
from posttrain_dist.config import RunConfig, complete
from posttrain_dist.data import DataConfig, OnBadRow, Source, Template
from posttrain_dist.data.chat.checks.check_table import CHECKS
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.dist import Process
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.folder import load_tokenizer
from posttrain_dist.prepare import prepare
from posttrain_dist.prepare.data_report import data_report, write_data_report

MAX_LENGTH = 64


def rendered(row: dict[str, Any]) -> str:
    user, assistant = (message["content"] for message in row["messages"])
    return f"<|user|>{user}<|end|><|assistant|>{assistant}<|end|>"


def histogram(length: int, count: int) -> list[list[int]]:
    """Of samples of one length: its bin and the empty one before, eight bins to an octave."""
    edges = sorted({round(2 ** (k / 8)) for k in range(8 * 8)})
    at = next(i for i, edge in enumerate(edges) if edge >= length)
    return [[edges[at - 1], 0], [edges[at], count]]


@pytest.fixture
def rows(builders: Any) -> dict[str, list[dict[str, Any]]]:
    """Rows of one size in each channel, all unlike each other; one of "long" is cut."""
    draw = random.Random(0)

    def word(length: int) -> str:  # digits are a token each: the tokenizer merges letters only
        return "".join(draw.choices("0123456789", k=length))

    return {
        "t": [builders.chat(word(6), word(5), "t") for _ in range(4)],
        "u": [builders.chat(word(9), word(14), "u") for _ in range(4)],
        "long": [builders.chat(word(20), word(60), "long")],
        "heldout": [builders.chat(word(7), word(4), "t")],
    }


@dataclass
class Made:
    """A prepared run, its files and its report."""

    config: RunConfig
    files: dict[str, Path]  # source -> file
    inputs: dict[str, Any]  # digests of what went in
    report: dict[str, Any]


@pytest.fixture
def made(
    rows: dict[str, list[dict[str, Any]]], builders: Any, tiny_llama: Path, tmp_path: Path
) -> Made:
    """Three times as much of source `a` as of `b`, and a broken line at the end of `a`."""
    files = {
        "a": builders.write(tmp_path / "a.jsonl", rows["t"]),
        "b": builders.write(tmp_path / "b.jsonl", rows["u"] + rows["long"]),
        "eval": builders.write(tmp_path / "eval.jsonl", rows["heldout"]),
    }
    with files["a"].open("a") as stream:
        stream.write("{\n")  # the fifth line
    sources = {"a": (files["a"], 3.0), "b": (files["b"], 1.0)}
    config = complete(
        RunConfig(
            name="mixed",
            model=ModelConfig(path=str(tiny_llama)),
            template=Template(strict=False),
            data=DataConfig(
                sources={n: Source(path=str(p), weight=w) for n, (p, w) in sources.items()},
                eval=str(files["eval"]),
                max_length=MAX_LENGTH,
                on_bad_row=OnBadRow.skip,
                cache=str(tmp_path / "cache"),
            ),
        )
    )
    folder = tmp_path / "prepared"
    inputs = prepare(config, folder).inputs
    return Made(config, files, inputs, data_report(config, folder))


def test_every_part_of_the_report(
    rows: dict[str, list[dict[str, Any]]], made: Made, tmp_path: Path
) -> None:
    report, files = made.report, made.files
    assert report.keys() == {
        *("format", "name", "settings", "files", "channels", "splits", "duplicates_moved"),
        *("near_leaks", "checks", "rejected", "turns", "sources", "examples", "batch"),
    }
    written = write_data_report(made.config, tmp_path / "prepared", tmp_path / "new")
    assert json.loads((tmp_path / "new" / "data_report.json").read_text()) == written == report
    assert (report["format"], report["name"]) == (made.inputs["format"], "mixed")
    assert report["settings"] == {
        "format": "auto",
        "max_length": MAX_LENGTH,
        "long_rows": "truncate",
        "template": "tokenizer",
        "template_sha256": made.inputs["template"],
        "supervise": "assistant",
        "form": "auto",
        "thinking": "keep",
        "variables": {},
        "strict": False,
        "tokenizer": made.config.model.path,
    }
    kinds = {"a": ("train", 4, 1), "b": ("train", 5, 0), "eval": ("eval", 1, 0)}
    assert report["files"] == [
        {
            "path": str(files[source]),
            "split": split,
            "source": source,
            "format": "messages",
            "rows": num_rows,
            "rejected": rejected,
            "left_out": 0,
        }
        for source, (split, num_rows, rejected) in kinds.items()
    ]
    (rejected,) = report["rejected"]
    assert rejected.keys() == {"file", "line", "byte", "field", "what", "fix", "ends_file"}
    assert (rejected["file"], rejected["line"]) == (str(files["a"]), 5)
    assert (report["duplicates_moved"], report["near_leaks"]) == (0, 0)
    _check_checks(report["checks"], f"{files['b']}:5")
    _check_conversations(report, rows, files)


def test_counts_and_shares_are_those_of_the_rows(
    rows: dict[str, list[dict[str, Any]]], made: Made, tiny_llama: Path
) -> None:
    tokenizer = load_tokenizer(tiny_llama)

    def tokens(text: str) -> int:
        return len(tokenizer.backend_tokenizer.encode(text).ids)

    def counts(name: str, *, cut: bool = False) -> dict[str, Any]:
        length = min(tokens(rendered(rows[name][0])), MAX_LENGTH)
        prompt = tokens(rendered(rows[name][0]).partition("<|assistant|>")[0]) + 1
        count = len(rows[name])
        return {
            "rows": count,
            "samples": count,
            "tokens": length * count,
            "supervised": (length - prompt) * count,
            "truncated": int(cut),
            "dropped": 0,
            "duplicates": 0,
            "near_duplicates": 0,
            "lengths": histogram(length, count),
        }

    assert made.report["channels"] == ["long", "t", "u"]
    assert made.report["splits"] == {
        "train": {"long": counts("long", cut=True), "t": counts("t"), "u": counts("u")},
        "eval": {"t": counts("heldout")},
    }
    _check_sources(made.report["sources"], counts("t"), counts("u"), counts("long"))


def _check_checks(checks: list[dict[str, Any]], cut: str) -> None:
    """All ten rows were checked, and the one that was cut has lost its end."""
    failing = {"end_of_turn": [cut]}
    assert checks == [
        {
            "name": name,
            "level": check.level,
            "explain": check.explain,
            "fix": check.fix,
            "checked": 10,
            "failed": len(failing.get(name, [])),
            "rows": failing.get(name, []),
        }
        for name, check in CHECKS.items()
        if not check.of_answers
    ]


def _check_sources(sources: dict[str, dict[str, float]], t: Any, u: Any, long: Any) -> None:
    """3 : 1 was asked, of 4 and 5 rows."""
    a, b = sources["a"], sources["b"]
    assert (list(sources), a["asked"], b["asked"]) == (["a", "b"], 0.75, 0.25)
    assert a["passes"] / b["passes"] == pytest.approx(3 * 5 / 4)
    assert a["rows_share"] + b["rows_share"] == pytest.approx(1)
    assert a["rows_share"] == pytest.approx(0.75, abs=0.06)  # whole rows, about ten of them
    assert a["token_share"] + b["token_share"] == pytest.approx(1)
    # A row of `a` is as long as any other of it; those of `b` are of two lengths.
    own = a["rows_share"] * t["supervised"] / 4
    bounds = [
        own / (own + b["rows_share"] * others)
        for others in (u["supervised"] / 4, long["supervised"])
    ]
    assert min(bounds) <= a["token_share"] <= max(bounds)


def _check_conversations(
    report: dict[str, Any], rows: dict[str, list[dict[str, Any]]], files: dict[str, Path]
) -> None:
    """Every row is shown (there are at most five a channel), from its place, with its mask."""
    places = {f"{files['a']}:{i + 1}": row for i, row in enumerate(rows["t"])}
    places |= {f"{files['b']}:{i + 1}": row for i, row in enumerate(rows["u"] + rows["long"])}
    places |= {f"{files['eval']}:1": rows["heldout"][0]}
    seen = set()
    for channel, examples in report["examples"].items():
        for example in examples:
            row = places[example["where"]]
            seen.add(example["where"])
            assert row["task_type"] == channel
            assert example["split"] == ("eval" if "eval" in example["where"] else "train")
            whole = "".join(text for text, _, _ in example["pieces"])
            taught = "".join(text for text, weight, _ in example["pieces"] if weight)
            if channel == "long":
                assert rendered(row).startswith(whole) and rendered(row) != whole
                assert row["messages"][1]["content"].startswith(taught) and taught
            else:
                assert whole == rendered(row)
                assert taught == row["messages"][1]["content"] + "<|end|>"
            assert example["tokens"] == len(example["pieces"])  # one per token: all is ASCII
            assert example["supervised"] == sum(weight > 0 for _, weight, _ in example["pieces"])
    assert seen == set(places)
    assert [len(report["examples"][channel]) for channel in "tu"] == [5, 4]

    batch = report["batch"]
    assert batch.keys() == {"tokens", "samples", "pieces"}
    assert batch["tokens"] == len(batch["pieces"]) <= MAX_LENGTH
    assert sorted({piece[3] for piece in batch["pieces"]}) == list(range(batch["samples"]))
    trained = {rendered(row) for row in rows["t"] + rows["u"]}
    for sample in range(batch["samples"]):
        text = "".join(piece[0] for piece in batch["pieces"] if piece[3] == sample)
        assert text in trained or rendered(rows["long"][0]).startswith(text)


def test_the_first_pack_is_that_of_the_run(made: Made, tmp_path: Path) -> None:
    """Tokens, weights and samples are those of the batch that training takes first."""
    folder = tmp_path / "prepared"
    config = replace(made.config, train=replace(made.config.train, micro_batch_size=1))
    source = make_source(config, Examples.open(folder, "train"), Process())
    batch = source.step(1)[0]
    weights = np.zeros(len(batch.input_ids_T))
    count = batch.num_targets
    weights[batch.supervised_N.numpy()[:count] + 1] = batch.weight_N.numpy()[:count]
    shown = data_report(config, folder)["batch"]
    assert (shown["tokens"], shown["samples"]) == (len(weights), len(batch.cu_seqlens_S) - 1)
    tokenizer = load_tokenizer(Path(config.model.path))
    assert [piece[:2] + piece[3:] for piece in shown["pieces"]] == [
        [tokenizer.decode([token]), weight, sample]
        for token, weight, sample in zip(
            batch.input_ids_T.tolist(),
            weights.tolist(),
            np.repeat(range(shown["samples"]), np.diff(batch.cu_seqlens_S)).tolist(),
            strict=True,
        )
    ]
    assert 0 < count < len(weights)
