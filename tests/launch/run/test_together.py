"""`posttrain run A --together B`: frozen runs in one process, each to a FINISHED of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from posttrain_launch.cli import main

from posttrain_dist.files import read_rows


def frozen(tmp_path: Path, tiny_llama: Path, rows_file: Path, name: str, *more: str) -> Path:
    """A run that was frozen and never started."""
    words = [
        f"model.path={tiny_llama}",
        f"data.train={rows_file}",
        f"output_root={tmp_path / 'out'}",
        f"data.cache={tmp_path / 'cache'}",
        f"name={name}",
        "tuning=lora",
        "train.steps=2",
        "train.batch_size=2",
        "train.dtype=float32",
        "data.max_length=64",
        "logging.wandb=off",
        *more,
    ]
    from posttrain_launch.compose.hydra_app import compose_command, read_command_line
    from posttrain_launch.run.freeze import freeze

    return freeze(compose_command(read_command_line("train", words, False)), "test")


def rows(folder: Path) -> list[dict[str, float]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]


def test_runs_together_end_as_alone_and_one_that_fails_ends_alone(
    tmp_path, tiny_llama, rows_file, capsys
):
    first = frozen(tmp_path, tiny_llama, rows_file, "first", "tuning.rank=2", "optimizer.lr=1e-3")
    broken = frozen(tmp_path, tiny_llama, rows_file, "broken")
    (broken / "metrics.jsonl").mkdir()  # which no training can write to
    second = frozen(tmp_path, tiny_llama, rows_file, "second", "tuning.rank=8", "optimizer.lr=1e-2")
    alone = {}
    for folder in (first, second):
        alone[folder] = tmp_path / f"alone-{folder.parent.name}"
        shutil.copytree(folder, alone[folder])
        assert main(["run", str(alone[folder])]) == 0
    capsys.readouterr()

    assert main(["run", str(first), "--together", str(broken), str(second)]) == 1
    printed = capsys.readouterr()
    assert str(broken / "metrics.jsonl") in printed.err
    for folder in (first, second):
        assert f"{folder.name}: finished" in printed.out
        assert json.loads((folder / "FINISHED").read_text())["step"] == 2
        own, expected = rows(folder), rows(alone[folder])
        losses = [row["train/loss"] for row in expected]
        assert [row["train/loss"] for row in own] == pytest.approx(losses, rel=1e-6)
        assert read_rows(folder / "logs" / "starts.jsonl")[-1]["cause"] == "finished"
    assert not (broken / "FINISHED").exists()
    assert read_rows(broken / "logs" / "starts.jsonl")[-1]["cause"] == "failed"

    assert main(["run", str(first), "--together", str(second)]) == 0  # nothing is left to do


def test_runs_of_other_data_are_refused_before_anything_begins(
    tmp_path, tiny_llama, rows_file, capsys
):
    first = frozen(tmp_path, tiny_llama, rows_file, "first")
    other = frozen(tmp_path, tiny_llama, rows_file, "other", "data.eval_fraction=0.5")
    assert main(["run", str(first), "--together", str(other)]) == 2
    printed = capsys.readouterr().err
    assert "data.eval_fraction" in printed and "sweep.together=1" in printed
    assert not (first / "metrics.jsonl").exists() and not (first / "prepared").exists()
