"""`hydra/launcher=together`: trials that share a base train in one process, others alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from posttrain_launch.cli import main
from posttrain_launch.sweep.folder import State, read_sweep, read_trials
from posttrain_launch.sweep.states import state_of

from posttrain_dist.files import read_rows

BASE = ["data.max_length=128", "train.steps=2", "train.dtype=float32", "data.eval_fraction=0.2"]
BASE += ["tuning=lora", "logging.wandb=off", "hydra/launcher=together"]


@pytest.fixture
def words(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> list[str]:
    places = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={tmp_path}/out"]
    return [*places, *BASE]


def pid_of(folder: Path) -> str:
    """Of the process that drove the run last."""
    return (folder / "logs" / "driver.lock").read_text().split()[0]


def test_trials_of_one_base_share_a_process_and_others_have_their_own(words, tmp_path, capfd):
    # The batch size is no part of an adapter: those of 2 and those of 4 are two groups.
    varied = ["tuning.rank=2,4", "train.batch_size=2,4", "hydra.launcher.at_once=3"]
    assert main(["train", "-m", *words, *varied]) == 0
    [folder] = (tmp_path / "out" / "run" / "sweeps").iterdir()
    trials = read_trials(read_sweep(folder).folder)
    assert [state_of(trial) for trial in trials] == [State.done] * 4
    pids = [pid_of(trial.folder) for trial in trials]
    # Of the first three: 0 and 2 differ in rank alone; 1 and the last one follow by themselves.
    assert pids[0] == pids[2] and len(set(pids)) == 3
    printed = capfd.readouterr().out
    for trial in trials:
        held_out = read_rows(trial.folder / "metrics.jsonl")[-1]["eval/loss"]
        assert f"trial {trial.number}: done, eval/loss {held_out:.4f}" in printed


def test_a_group_size_that_is_none_is_refused(words, capfd):
    assert main(["train", "-m", *words, "tuning.rank=2,4", "hydra.launcher.at_once=0"]) == 2
    assert "hydra.launcher.at_once: is 0, must be at least 1" in capfd.readouterr().err
