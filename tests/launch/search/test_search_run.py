"""`hydra/sweeper=posttrain_optuna` with real trainings: a killed driver, a trial given up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from posttrain_launch.cli import main
from posttrain_launch.sweep.folder import State, Trial, read_trials
from posttrain_launch.sweep.search.journal import open_study
from posttrain_launch.sweep.states import state_of
from ray_runs import wait_until

from posttrain_dist.config import RunConfig
from posttrain_dist.files import read_rows

BASE = ["data.max_length=128", "train.batch_size=2", "train.dtype=float32", "tuning=lora"]
BASE += ["logging.wandb=off", "data.eval_fraction=0.2", "hydra/sweeper=posttrain_optuna"]
RELATED = ["tuning.rank=2,4,8", "tuning.alpha=2*tuning.rank"]


@pytest.fixture
def words(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> list[str]:
    places = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={tmp_path}/out"]
    return [*places, *BASE]


def sweep_of(tmp_path: Path) -> Path:
    [folder] = (tmp_path / "out" / "run" / "sweeps").iterdir()
    return folder


def config_of(trial: Trial) -> RunConfig:
    return RunConfig.from_yaml((trial.folder / "config.yaml").read_text(encoding="utf-8"))


def steps_of(trial: Trial) -> list[int]:
    return [row["step"] for row in read_rows(trial.folder / "metrics.jsonl") if row["step"]]


def test_a_search_that_cannot_be_made_ends_before_it_begins(words, tmp_path, capsys):
    for more, says in (
        (["hydra.sweeper.pruner=hyperband"], "error: hydra.sweeper.pruner: there is no hyperband"),
        (["hydra.sweeper.metric=loss"], "error: hydra.sweeper.metric: is loss, which is no held-"),
        (["optimizer.lr=interval(2,1)"], "error: optimizer.lr: interval(2,1) is empty"),
        (["tuning.rank=tuning.alpha/3,4"], "with tuning.alpha=32.0 is 10.6667"),
    ):
        assert main(["train", "-m", *words, *more]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_search_whose_driver_is_killed_goes_on(words, tmp_path, capfd):
    more = [*RELATED, "optimizer.lr=tag(log, interval(1e-4,1e-1))", "train.steps=30"]
    more += ["hydra.sweeper.n_trials=4", "hydra.sweeper.startup_trials=2", "hydra.sweeper.seed=2"]
    command = [sys.executable, "-m", "posttrain_launch.cli", "train", "-m", *words, *more]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)

        def second_trains() -> bool:
            return any((tmp_path / "out").glob("run/sweeps/*/trial-001/metrics.jsonl"))

        wait_until(second_trains, timeout_s=120)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    folder = sweep_of(tmp_path)
    with (folder / "study.journal").open("ab") as journal:
        journal.write(b'{"op_code":5,"trial')
    assert main(["run", str(folder)]) == 0
    trials = read_trials(folder)
    assert [state_of(trial) for trial in trials] == [State.done] * 4
    assert len({trial.overrides for trial in trials}) == 4
    values = []
    for trial in trials:
        assert steps_of(trial) == list(range(1, 31))
        config = config_of(trial)
        assert config.tuning.alpha == 2 * config.tuning.rank
        typed = dict(word.split("=", 1) for word in trial.overrides)
        assert config.optimizer.lr == float(typed["optimizer.lr"])
        rows = read_rows(trial.folder / "metrics.jsonl")
        values.append([row["eval/loss"] for row in rows if "eval/loss" in row][-1])
    assert [trial.value for trial in open_study(folder, "minimize").trials] == values
    page = (folder / "sweep.html").read_text(encoding="utf-8")
    assert f"{min(values):.4f}" in page
    assert "tuning.rank \N{MULTIPLICATION SIGN} optimizer.lr" in page
    shown = capfd.readouterr().out
    assert f"the best, trial {values.index(min(values))}, as a run of its own" in shown


@pytest.mark.slow
def test_a_trial_that_is_given_up_keeps_its_checkpoint_and_can_go_on(words, tmp_path, capfd):
    # A rate of 1e-9 trains nothing: whenever it comes second, it is worse at the first evaluation.
    more = [*RELATED[1:], "tuning.rank=4", "optimizer.lr=1e-2,1e-9", "train.steps=300"]
    more += ["train.eval_every=5", "hydra.sweeper.pruner=asha", "hydra.sweeper.reduction=2"]
    seed = "hydra.sweeper.seed=3"  # the better one comes first
    assert main(["train", "-m", *words, *more, seed]) == 0
    good, poor = read_trials(sweep_of(tmp_path))
    assert [config_of(good).optimizer.lr, config_of(poor).optimizer.lr] == [1e-2, 1e-9]
    assert [state_of(good), state_of(poor)] == [State.done, State.pruned]
    [decided] = re.findall(r"trial 1: given up at step (\d+)", capfd.readouterr().out)
    last = steps_of(poor)[-1]
    assert int(decided) <= last < 150
    [checkpoint] = (poor.folder / "checkpoints").glob("step-*")
    assert checkpoint.name == f"step-{last:06d}"
    assert (checkpoint / "MANIFEST.json").is_file()

    assert main(["run", str(poor.folder)]) == 0
    assert (poor.folder / "FINISHED").is_file()
    assert steps_of(poor) == list(range(1, 301))
