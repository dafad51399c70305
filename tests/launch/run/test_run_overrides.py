"""`posttrain run RUN key=value`: the few things that may change, done once and recorded."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import yaml
from posttrain_launch.cli import main
from posttrain_launch.commands.run import run_overrides
from posttrain_launch.run import driver

from posttrain_dist.checkpoint import store
from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.engine import AdamW
from posttrain_dist.errors import TrainingError
from posttrain_dist.files import read_rows, write_atomic
from posttrain_dist.metrics import LoggingConfig, WandbMode


@pytest.fixture(scope="module")
def finished(tiny_llama, rows_file, tmp_path_factory):
    """A finished run of 4 steps, saved at 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            optimizer=AdamW(lr=3e-3),
            train=TrainConfig(steps=4, batch_size=2, micro_batch_size=2, save_every=2),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml() + "choices:\n  engine: single\n")
    (folder / "overrides.yaml").write_text("- train.steps=4\n")
    (folder / "plan.json").write_text("{}")
    (folder / "run.json").write_text('{"wandb_id": "abc", "hashes": {"config": "x"}}')
    assert main(["run", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def losses(run):
    return [row["train/loss"] for row in read_rows(run / "metrics.jsonl") if "train/loss" in row]


def names(folder):
    return sorted(path.name for path in folder.glob("step-*"))


def record(run):
    return json.loads((run / "run.json").read_text())


def test_never_starts_a_run_again_once_and_keeps_what_there_was(run, capsys):
    before = losses(run)
    assert main(["run", str(run)]) == 0
    assert "is already finished" in capsys.readouterr().out
    for path in store.checkpoints(run):
        (path / "MANIFEST.json").unlink()
    (run / "FINISHED").unlink()
    assert main(["run", str(run)]) == 1
    assert f"posttrain run {run} train.resume=never" in capsys.readouterr().err
    assert main(["run", str(run), "train.resume=never"]) == 0
    assert losses(run) == before
    assert names(run / "checkpoints.old-1") == ["step-000002", "step-000004"]
    assert names(run / "checkpoints") == ["step-000002", "step-000004"]
    assert RunConfig.from_yaml((run / "config.yaml").read_text()).train.resume == "auto"
    kept = yaml.safe_load((run / "overrides.yaml").read_text())
    assert kept == ["train.steps=4", "train.resume=never"]
    assert record(run)["continued"][0]["overrides"] == ["train.resume=never"]
    assert record(run)["wandb_id"] != "abc"


def test_a_refused_start_leaves_the_run_as_it_was(run, capsys):
    def files():
        return {n: (run / n).read_bytes() for n in (*run_overrides.WRITTEN, "metrics.jsonl")}

    before = files()
    assert main(["run", str(run), "train.steps=3", "optimizer.lr=1e-4"]) == 2
    said = capsys.readouterr()
    assert "error: train.steps: is 3, and the run is at step 4" in said.err
    assert "supervised" not in said.out  # at once, before the data is looked at
    os.truncate(run / "prepared" / "train.npy", 9)
    assert main(["run", str(run), "train.steps=6"]) == 1  # late: once its data is looked at
    assert "lacks a file, or has one that was cut" in capsys.readouterr().err
    assert files() == before
    for choice in ("never", run / "checkpoints" / "step-000002"):  # checkpoints are put back too
        assert main(["run", str(run), f"train.resume={choice}"]) == 1
        assert files() == before and not list(run.glob("checkpoints.old-*"))
        assert names(run / "checkpoints") == ["step-000002", "step-000004"]
    assert main(["run", str(run), "foo=1", "train.stepz=3"]) == 2
    said = capsys.readouterr().err
    assert "foo: unknown key" in said and "train.steps" in said
    assert files() == before


def test_a_fallback_that_never_trained_is_undone_with_the_start_that_took_it(run, monkeypatch):
    before = {path: path.read_bytes() for path in (run / "plan.json", run / "config.yaml")}

    def fails(config, folder, *_):
        for path in before:
            path.write_text("of the fallback")
        raise TrainingError("no memory for that either", where="the rehearsal")

    monkeypatch.setattr(driver, "_drive", fails)
    assert main(["run", str(run), "train.steps=6"]) == 1
    assert {path: path.read_bytes() for path in before} == before


def test_what_a_training_began_with_stays_though_it_fails(run, monkeypatch, capsys):
    """Also where it begins as the start before it did, and so writes the same plan."""
    plan = (run / "logs" / "plan.json").read_text()

    def fails(config, folder, *_):
        write_atomic(folder / "logs" / "plan.json", plan)
        raise TrainingError("the gradient is not finite", where="step 5")

    monkeypatch.setattr(driver, "_drive", fails)
    assert main(["run", str(run), "train.steps=6", "optimizer.lr=1e-3"]) == 1
    assert "the gradient is not finite" in capsys.readouterr().err
    assert RunConfig.from_yaml((run / "config.yaml").read_text()).optimizer.lr == 1e-3
    assert not (run / "FINISHED").exists()


def test_a_finished_run_goes_on_with_more_steps_and_another_rate_said_in_one_line(run, capsys):
    before = losses(run)
    assert main(["run", str(run), "train.steps=6", "optimizer.lr=1e-3"]) == 0
    said = capsys.readouterr().out
    told = "with other settings: optimizer.lr was 0.003, now 0.001; train.steps was 4, now 6"
    assert said.count(told) == 1
    assert len(losses(run)) == 6 and losses(run)[:4] == before
    assert json.loads((run / "FINISHED").read_text())["step"] == 6
    overrides, notices = record(run)["continued"]
    assert overrides["overrides"] == ["train.steps=6", "optimizer.lr=1e-3"]
    assert notices["step"] == 4 and told in notices["notices"][0]
    frozen = yaml.safe_load((run / "config.yaml").read_text())
    assert (frozen["train"]["steps"], frozen["choices"]) == (6, {"engine": "single"})


def test_a_damaged_checkpoint_is_passed_over_in_a_line_on_the_terminal(run, capsys):
    before = losses(run)
    (run / "FINISHED").unlink()
    newest = store.folder_of(run, 4)
    state = newest / "state" / "single.pt"
    state.write_bytes(state.read_bytes()[:-9] + b"something")
    assert main(["run", str(run)]) == 0
    said = f"{newest} is passed over, going on from step-000002: state/single.pt is damaged: "
    assert capsys.readouterr().out.count(said) == 1
    assert losses(run) == before
    assert main(["run", str(run)]) == 0  # it was made again
    assert "is passed over" not in capsys.readouterr().out


def test_a_checkpoint_of_the_run_itself_is_gone_back_to(run):
    before = losses(run)
    named = store.folder_of(run, 2)
    assert main(["run", str(run), f"train.resume={named}"]) == 0
    assert names(run / "checkpoints.old-1") == ["step-000004"]
    assert losses(run) == before  # steps 3 and 4 were trained again


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("train.batch_size=4", 2, "train.batch_size: is fixed when a run is made"),
        ("engine=zero2", 2, "engine: is fixed when a run is made"),
        ("template.variables.x=1", 2, "template.variables.x: is fixed when a run is made"),
        ("resume", 2, "resume: is no key=value"),
        ("train.resume=/nowhere", 1, "is no checkpoint of this run (step-000002, step-000004)"),
        ("train.steps=many", 2, "train.steps: 'many' is not a whole number or null"),
        ("train.steps=-1", 2, "train.steps: is -1"),
        ("cluster.max_failures=2", 2, "cluster.max_failures: unknown key"),
        ("optimizer.lr=1e-4", 2, "is finished"),
    ],
)
def test_what_cannot_change_is_refused_and_nothing_is_touched(finished, word, code, said, capsys):
    def state():
        paths = [path for path in finished.rglob("*") if "logs" not in path.parts]
        return {path: path.read_bytes() for path in paths if path.is_file()}

    before = state()
    assert main(["run", str(finished), word]) == code
    assert said in capsys.readouterr().err
    assert state() == before
