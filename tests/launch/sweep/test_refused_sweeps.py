"""What a sweep is not begun with, or not gone on with, and what a broken one still says."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from posttrain_launch.cli import main
from posttrain_launch.compose.composer import Composer
from posttrain_launch.compose.problems import check_sweep
from posttrain_launch.sweep.combinations import Combinations
from posttrain_launch.sweep.folder import State, Sweep, Trial, read_trials, write_sweep
from posttrain_launch.sweep.loop import Loop
from posttrain_launch.sweep.results import read_results
from posttrain_launch.sweep.states import state_of

from posttrain_dist.errors import ConfigError, PosttrainError, SeveralErrors


def a_sweep(folder: Path, metric: str = "eval/loss") -> Sweep:
    sweep = Sweep(
        folder=folder,
        name="s",
        command="",
        created="",
        cwd=str(folder),
        shared=["train.steps=9"],
        metric=metric,
        backend={"kind": "basic"},
        search={"kind": "basic"},
    )
    write_sweep(sweep)
    return sweep


class OneRow:
    """A backend whose trials evaluate once, and train until they are stopped."""

    slots, waits, retries = 1, True, 0

    def __init__(self) -> None:
        self.stopped = False

    def start(self, trials: Sequence[Trial]) -> None:
        row = {"step": 0, "eval/loss": 2.0, "eval_channel_loss/a": 1.0, "eval_channel_loss/b": 3.0}
        for trial in trials:
            (trial.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    def running(self) -> set[int]:
        return {0}

    def code(self, number: int) -> int | None:
        return None

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        pass


def test_a_metric_that_no_run_has_ends_the_sweep_at_its_first_evaluation(tmp_path):
    sweep, backend = a_sweep(tmp_path / "s", "eval_channel_loss/nope"), OneRow()

    def freeze(trial: Trial) -> None:
        trial.folder.mkdir()
        (trial.folder / "config.yaml").touch()

    search = Combinations([("train.steps=9", "tuning.rank=4"), ("train.steps=9", "tuning.rank=8")])
    with pytest.raises(ConfigError) as error:
        Loop(sweep, backend, search, freeze, print).run()
    assert error.value.where == "hydra.sweeper.metric"
    assert "one of eval/loss, eval_channel_loss/a, eval_channel_loss/b" in str(error.value)
    assert backend.stopped and len(read_trials(sweep.folder)) == 1


def test_a_sweep_of_which_nothing_can_begin_ends_after_three_trials(tmp_path, capsys):
    sweep = a_sweep(tmp_path / "s")

    def freeze(trial: Trial) -> None:
        raise ConfigError("cannot fit: 3 GiB are missing", where="tuning", fix="use larger GPUs")

    search = Combinations([("train.steps=9", f"tuning.rank={rank}") for rank in range(1, 200)])
    with pytest.raises(PosttrainError, match="the first 3 trials all cannot begin: cannot fit"):
        Loop(sweep, OneRow(), search, freeze, print).run()
    assert capsys.readouterr().out.count("cannot fit") == 3


def test_a_stop_while_folders_are_made_starts_nothing(tmp_path):
    sweep, made = a_sweep(tmp_path / "s"), list[int]()

    def freeze(trial: Trial) -> None:
        trial.folder.mkdir()
        (trial.folder / "config.yaml").touch()
        made.append(trial.number)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    class Queue(OneRow):
        slots = None

        def start(self, trials: Sequence[Trial]) -> None:
            raise AssertionError("nothing is to be submitted any more")

        def running(self) -> set[int]:
            return set()

    search = Combinations([("train.steps=9", f"tuning.rank={rank}") for rank in range(1, 50)])
    states = Loop(sweep, Queue(), search, freeze, print).run()
    assert made == [0, 1] and set(states.values()) == {State.waiting}


def test_a_cancelled_trial_is_stopped_and_not_waiting(tmp_path):
    trial = Trial(0, (), tmp_path)
    assert state_of(trial) is State.waiting
    (tmp_path / "STOP").write_text("cancel\n")
    assert state_of(trial) is State.stopped


def test_a_pruner_without_evaluations_is_refused(tiny_llama, rows_file, tmp_path, capsys):
    words = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={tmp_path}/out"]
    words += ["tuning=lora", "tuning.rank=4,8", "train.steps=6", "hydra/sweeper=posttrain_optuna"]
    words += ["hydra.sweeper.pruner=asha"]
    for more in ([], ["train.eval_every=6"]):
        assert main(["train", "-m", *words, *more]) == 2
        assert "hydra.sweeper.pruner: is asha, and no trial is evaluated" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_is_one_problem_however_many_values_it_has():
    with Composer() as composer, pytest.raises((ConfigError, SeveralErrors)) as error:
        check_sweep(composer, ["tuning=lora", "tuning.rnk=8,16,32"])
    assert str(error.value).count("tuning.rnk") == 1


def test_a_line_that_is_no_trial_is_named(tmp_path):
    sweep = a_sweep(tmp_path / "s")
    line = json.dumps({"number": 0, "overrides": ["tuning.rank=4"], "extra": {}})
    (sweep.folder / "trials.jsonl").write_text(f'{line}\n{{"half\n')
    with pytest.raises(PosttrainError) as error:
        read_trials(sweep.folder)
    assert error.value.where == f"{sweep.folder}/trials.jsonl:2"


def test_a_single_trial_is_named_by_what_the_sweep_varies(tmp_path):
    sweep = a_sweep(tmp_path / "s")
    line = {"number": 0, "overrides": ["train.steps=9", "tuning.rank=4"], "extra": {}}
    (sweep.folder / "trials.jsonl").write_text(json.dumps(line) + "\n")
    [trial] = read_results(sweep)["trials"]
    assert trial["varied"] == {"tuning.rank": "4"}
