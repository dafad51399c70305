"""`hydra/launcher=together`: trials that share a base train in one process, others alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from posttrain_launch.cli import main
from posttrain_launch.sweep.backends.together import groups
from posttrain_launch.sweep.folder import State, Trial, read_sweep, read_trials
from posttrain_launch.sweep.results import read_results
from posttrain_launch.sweep.states import state_of

from posttrain_dist.config import AdamW, Lora, RunConfig, complete
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


def test_trials_of_one_base_share_a_process(words, tmp_path, capfd):
    assert main(["train", "-m", *words, "tuning.rank=2,4", "hydra.launcher.at_once=3"]) == 0
    [folder] = (tmp_path / "out" / "run" / "sweeps").iterdir()
    trials = read_trials(read_sweep(folder).folder)
    assert [state_of(trial) for trial in trials] == [State.done] * 2
    assert pid_of(trials[0].folder) == pid_of(trials[1].folder)
    # What the one process took is the cost of both.
    for row in read_results(read_sweep(folder))["trials"]:
        assert row["cost_s"] == pytest.approx(row["seconds"] / 2) and row["seconds"] > 0
    printed = capfd.readouterr().out
    for trial in trials:
        held_out = read_rows(trial.folder / "metrics.jsonl")[-1]["eval/loss"]
        assert f"trial {trial.number}: done, eval/loss {held_out:.4f}" in printed


def test_trials_that_differ_in_more_than_their_adapter_train_by_themselves(tmp_path):
    def trial(number: int, batch_size: int, **adapter: object) -> Trial:
        folder = tmp_path / f"trial-{number:03d}"
        folder.mkdir()
        config = RunConfig(tuning=Lora(**adapter), optimizer=AdamW(lr=1e-3 * (number + 1)))
        config.train.batch_size = batch_size
        (folder / "config.yaml").write_text(complete(config).to_yaml() + "choices: {}\n")
        return Trial(number, (), folder)

    trials = [
        trial(0, 2, rank=2),
        trial(1, 4, rank=2),
        trial(2, 2, rank=8, alpha=4.0),
        trial(3, 2, rank=2, dropout=0.1),
        trial(4, 4, rank=4, dora=True),
    ]
    found = groups(trials)
    numbers = [[each.number for each in group] for group in found.groups]
    assert numbers == [[0, 2], [1, 4], [3]]
    assert list(found.alone) == [3] and found.alone[3].startswith("tuning.dropout is 0.1")


def test_a_group_size_that_is_none_is_refused(words, capfd):
    assert main(["train", "-m", *words, "tuning.rank=2,4", "hydra.launcher.at_once=0"]) == 2
    assert "hydra.launcher.at_once: is 0, must be at least 1" in capfd.readouterr().err
