"""A run whose job ends soon: it saves, leaves in time, and says that it is to be started again."""

import json
import time

import pytest
from posttrain_launch.cli import main
from posttrain_launch.lifecycle import starts

from posttrain_dist.checkpoint.manifest import newest_step
from posttrain_dist.checkpoint.save_times import save_times


@pytest.fixture
def words(tiny_llama, rows_file, tmp_path):
    return [
        f"model.path={tiny_llama}",
        f"data.train={rows_file}",
        f"output_root={tmp_path}",
        "data.max_length=64",
        "train.batch_size=2",
        "train.steps=100000",
        "train.save_every=50000",
        "train.rehearse=true",
        "train.dtype=float32",
        "train.log_every=1000",
        "optimizer.lr=1e-4",
        "logging.wandb=off",
    ]


@pytest.mark.slow  # a machine that is busy may not come to its first step in ten seconds
def test_a_run_stops_before_its_deadline(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("posttrain_launch.lifecycle.deadline.POLL_S", 0.05)
    deadline = time.time() + 14  # half of it trains
    monkeypatch.setenv("POSTTRAIN_DEADLINE", str(deadline))
    assert main(["train", *words]) == 85
    assert time.time() < deadline
    [folder] = (tmp_path / "run").iterdir()
    outcome = json.loads((folder / "logs" / "outcome.json").read_text())
    assert newest_step(folder) == outcome["step"] > 0
    [start] = starts.read(folder)
    assert {key: start[key] for key in ("job", "before", "step", "code", "cause", "action")} == {
        "job": None, "before": 0, "step": outcome["step"], "code": 85, "cause": "time_limit",
        "action": "requeue",
    }  # fmt: skip
    assert len(save_times(folder)) == 2  # the rehearsed one too
    said = capsys.readouterr().out
    assert "saving and leaving" in said
    assert f"saved and left at step {outcome['step']} of 100000; its job goes on with" in said


def test_a_deadline_that_is_no_time_ends_the_run_before_it_trains(words, monkeypatch, capsys):
    monkeypatch.setenv("POSTTRAIN_DEADLINE", "tonight")
    assert main(["train", *words]) == 2
    assert "POSTTRAIN_DEADLINE: is 'tonight', which is no time" in capsys.readouterr().err
