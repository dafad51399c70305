"""Data from the command line: sources by weight, the data report, the gate, early stopping."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from posttrain_launch.cli import main

from posttrain_dist.files import read_rows
from posttrain_dist.prepare import build_dataset

# A template that loses what an earlier turn said, as reasoning templates do.
FORGETS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else m.content[:1] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def words(tiny_llama: Path, tmp_path: Path) -> list[str]:
    return [
        f"model.path={tiny_llama}",
        f"output_root={tmp_path}/out",
        f"data.cache={tmp_path}/cache",
        "data.max_length=64",
        "train.batch_size=2",
        "train.dtype=float32",
        "logging.wandb=off",
        "checkpoint.export=false",
    ]


def turns(count: int, task: str) -> dict[str, Any]:
    messages = []
    for i in range(count):
        messages += [
            {"role": "user", "content": f"q{i}"},
            {"role": "assistant", "content": f"a{i}"},
        ]
    return {"messages": messages, "task_type": task}


def run_folder(tmp_path: Path, name: str = "run") -> Path:
    (found,) = (tmp_path / "out" / name).glob("2*")
    return found


def test_a_run_of_two_sources_takes_what_was_asked(
    words: list[str], builders: Any, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    for name, count in (("short", 300), ("long", 100)):
        size = 3 if name == "short" else 12
        rows = [
            builders.chat(f"{name} {i}", "x" * int(draw.integers(1, size)), name)
            for i in range(count)
        ]
        builders.write(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "two.yaml").write_text(
        "# @package _global_\n"
        "name: two\n"
        "data:\n"
        "  mix_by: tokens\n"
        "  sources:\n"
        f"    a: {{path: {tmp_path}/short.jsonl, weight: 3.0}}\n"
        f"    b: {{path: {tmp_path}/long.jsonl, weight: 1.0}}\n"
    )
    more = ["experiment=two", "train.epochs=3", "train.log_every=2"]
    assert main(["train", *words, *more, "--config-dir", str(tmp_path / "conf")]) == 0

    folder = run_folder(tmp_path, "two")
    rows = read_rows(folder / "metrics.jsonl")
    trained = [row for row in rows if "train/loss" in row]
    assert all("source_share/a" in row and "source_share/b" in row for row in trained)
    last = trained[-1]
    assert last["source_share/a"] == pytest.approx(0.75, abs=0.01)
    tokens = last["source_tokens/a"] + last["source_tokens/b"]
    assert last["source_share/a"] == last["source_tokens/a"] / tokens
    # A channel a source: what the losses were made of is what was asked for. A row stands for
    # the tokens drawn since the one before.
    counts = np.diff([0, *(row["source_tokens/a"] + row["source_tokens/b"] for row in trained)])
    shares = [row["channel_share/short"] for row in trained]
    assert np.average(shares, weights=counts) == pytest.approx(0.75, abs=0.01)
    report = json.loads((folder / "data_report.json").read_text())
    assert report["sources"]["a"]["asked"] == 0.75
    assert report["sources"]["a"]["token_share"] == pytest.approx(0.75, abs=0.01)
    assert report["sources"]["a"]["passes"] > 1.4  # drawn again, in other steps
    assert (
        not (folder / "logs" / "alarms.jsonl").exists()
        or "_channel" not in (folder / "logs" / "alarms.jsonl").read_text()
    )


def test_the_report_of_the_data_belongs_to_the_run(
    words: list[str], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words, f"data.train={rows_file}", "train.steps=2"]) == 0
    assert "format of the rows: messages, recognised" in capsys.readouterr().out
    folder = run_folder(tmp_path)
    digest = hashlib.sha256((folder / "data_report.json").read_bytes()).hexdigest()
    assert json.loads((folder / "run.json").read_text())["hashes"]["data_report"] == digest
    manifest = json.loads((folder / "checkpoints" / "step-000002" / "MANIFEST.json").read_text())
    assert manifest["lineage"]["hashes"]["data_report"] == digest
    prepared = json.loads((folder / "prepared" / "summary.json").read_text())
    assert manifest["lineage"]["template_sha256"] == prepared["inputs"]["template"]
    assert len(manifest["lineage"]["template_sha256"]) == 64
    assert "<html" in (folder / "data_report.html").read_text()


def not_again(*_: Any) -> None:
    raise AssertionError("what is in the cache is built again")


def test_prepare_writes_the_report_and_reads_no_row_twice(
    words: list[str],
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["prepare", *words, f"data.train={rows_file}", "name=mine"]
    assert main(words) == 0
    first = capsys.readouterr().out
    page = tmp_path / "out" / "mine" / "data_report.html"
    assert f"data report: {page}" in first
    for channel in ("copy", "reverse", "upper"):
        assert channel in first
    (cached,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    before = {path: path.stat().st_mtime_ns for path in cached.rglob("*")}
    page.unlink()
    monkeypatch.setattr(build_dataset, "build_dataset", not_again)
    assert main(words) == 0
    assert capsys.readouterr().out == first
    assert page.is_file()
    assert {path: path.stat().st_mtime_ns for path in cached.rglob("*")} == before


def test_training_does_not_start_when_a_check_fails(
    words: list[str], builders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "forgets.jinja").write_text(FORGETS)
    data = builders.write(tmp_path / "rows.jsonl", [turns(2, "t") for _ in range(6)])
    words = [*words, f"data.train={data}", f"template.name={tmp_path}/forgets.jinja"]
    words += ["train.steps=1", "data.eval_fraction=0"]
    whole = [*words, "template.form=conversation"]
    assert main(["train", *whole]) == 1
    text = capsys.readouterr().err
    assert f"{data}:1" in text and "template.form=turns" in text
    assert "6 rows, first at line 1: " in text
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    assert main(["prepare", *whole, "template.strict=false", "name=loose"]) == 0
    report = json.loads((tmp_path / "out" / "loose" / "data_report.json").read_text())
    (check,) = [check for check in report["checks"] if check["name"] == "prompt_prefix"]
    assert (check["failed"], check["checked"]) == (6, 6)
    assert check["rows"] == [f"{data}:{line}" for line in range(1, 7)]

    # A sample of each turn, which also is what is done where nothing is said.
    capsys.readouterr()
    for name, form in (("auto", []), ("turns", ["template.form=turns"])):
        assert main(["prepare", *words, *form, f"name={name}"]) == 0
        assert "6 of 6 rows are trained turn by turn" in capsys.readouterr().out
        report = json.loads((tmp_path / "out" / name / "data_report.json").read_text())
        counts = report["splits"]["train"]["t"]
        assert (counts["rows"], counts["samples"]) == (6, 12)
        assert report["turns"]["samples"] == 12
        assert not any(check["failed"] for check in report["checks"])


def test_a_bad_row_is_skipped_and_counted(
    words: list[str], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"messages": 1}\n' + rows_file.read_text())
    words = ["prepare", *words, f"data.train={data}"]
    assert main(words) == 1
    assert f"{data}:1 (byte 0): messages" in capsys.readouterr().err
    assert main([*words, "data.on_bad_row=skip", "name=skips"]) == 0
    report = json.loads((tmp_path / "out" / "skips" / "data_report.json").read_text())
    assert [row["line"] for row in report["rejected"]] == [1]
    assert sum(file["rejected"] for file in report["files"]) == 1
    assert sum(file["rows"] for file in report["files"]) == 90


def test_an_alarm_ends_the_run_with_a_checkpoint(
    words: list[str], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words += [f"data.train={rows_file}", "data.eval_fraction=0", "train.steps=40"]
    words += ["diagnose.low_loss=100", "diagnose.window=10", "diagnose.early_stop=[low_loss]"]
    assert main(["train", *words]) == 0
    folder = run_folder(tmp_path)
    ended = json.loads((folder / "FINISHED").read_text())
    assert ended["reason"] == "early_stop"
    assert 10 <= ended["step"] < 20
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[-1]["step"] == ended["step"]
    fired = [row["step"] for row in rows if row.get("alarm/low_loss") == 1.0]
    assert fired == [ended["step"] - 1]  # found after that step; the next one was the last
    assert (folder / "checkpoints" / f"step-{ended['step']:06d}" / "MANIFEST.json").is_file()
    text = capsys.readouterr().out
    assert f"ended early at step {ended['step']}" in text
    assert "low_loss" in (folder / "report.html").read_text()
    assert "low_loss" in (folder / "logs" / "alarms.jsonl").read_text()


# ------------------------------------------------------------------------------- --template

OPENS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] }}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}"
    "{% endif %}"
)


def test_inspect_shows_a_conversation_turn_by_turn(
    words: list[str], builders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "opens.jinja").write_text(OPENS)
    thinks = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "why"},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "Bye", "reasoning_content": "so"},
    ]
    plain = {"messages": [thinks[0], {"role": "assistant", "content": "Hello"}]}
    data = builders.write(tmp_path / "rows.jsonl", [plain, {"messages": thinks}, plain])
    words = ["inspect", *words, f"data.train={data}", f"template.name={tmp_path}/opens.jinja"]
    assert main([*words, "--template"]) == 1
    out, err = capsys.readouterr()
    assert f"{data}:2, channel rows: each turn is a sample of its own" in out
    first, second = out.split("── turn ")[1:]
    assert first.startswith("1, sample 1 of 2\n") and second.startswith("2, sample 2 of 2\n")
    lines = [line.strip() for line in second.splitlines()]
    for line in (
        "prompt │<|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>More<|end|><|assistant|><think>",
        *("trained on │so", "│</think>", "│Bye", "its end │<|end|>"),
    ):
        assert line in lines
    # What is refused, once for each cause, with its way out.
    assert "2 rows, first at line 1: the inference prompt of messages[1] opens its thoughts" in err
    assert "template.thinking=close" in err
    assert main([*words, "--template", "template.thinking=close"]) == 0
    assert "none of the first 3 rows is refused" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_inspect_shows_what_is_refused_all_the_same(
    words: list[str], builders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "opens.jinja").write_text(OPENS)
    data = builders.write(tmp_path / "rows.jsonl", [turns(2, "t")])
    words = ["inspect", *words, f"data.train={data}", f"template.name={tmp_path}/opens.jinja"]
    assert main([*words, "--template"]) == 1
    out = capsys.readouterr().out
    assert "would be refused; as it is rendered all the same" in out and "trained on │" in out
