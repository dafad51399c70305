"""A run from Python: no Hydra, no Ray, and the same end as that of a command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain_dist.config import DataConfig, ModelConfig, Ray, RunConfig, TrainConfig
from posttrain_dist.errors import ConfigError, PosttrainError
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.models.folder import load_tokenizer
from posttrain_dist.run import Outcome, discard_refused, finish, run


@pytest.fixture
def config(tiny_llama: Path, rows_file: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(tiny_llama)),
        data=DataConfig(train=str(rows_file), max_length=64),
        train=TrainConfig(steps=3, batch_size=2),
        logging=LoggingConfig(wandb=WandbMode.off),
    )


def leave(folder: Path, **outcome: object) -> Path:
    """What a training leaves behind for `finish`."""
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(RunConfig().to_yaml())
    (folder / "logs" / "outcome.json").write_text(json.dumps(outcome))
    return folder


def test_a_run_ends_in_its_report_and_is_then_left_alone(config, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "STOP").touch()  # of an earlier start
    ended = Outcome(completed=True, step=3, total_steps=3)
    assert run(config, folder) == ended
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == f"run folder: {folder}"
    assert f"data report: {folder / 'data_report.html'}" in lines
    steps = [line.split("  ")[0] for line in lines if "held-out loss" in line and "/3  " in line]
    assert (steps[0], steps[-1]) == ("step 0/3", "step 3/3")
    assert lines[-2].split() == ["report", str(folder / "report.html")]
    assert "Loading" not in shown.out + shown.err  # what libraries print
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert json.loads((folder / "FINISHED").read_text()) == {"reason": "completed", "step": 3}
    assert "<html" in (folder / "report.html").read_text()

    (folder / "report.html").unlink()
    assert run(config, folder) == ended
    assert capsys.readouterr().out.startswith(f"{folder} is already finished; `posttrain report ")
    assert not (folder / "report.html").exists()


def test_a_run_can_be_silent_and_goes_on_in_silence(config, tmp_path, capsys):
    config = replace(config, train=TrainConfig(steps=1, batch_size=2))
    assert run(config, tmp_path / "run", progress=False).completed
    assert run(config, tmp_path / "run", progress=False).completed
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
    assert (tmp_path / "run" / "FINISHED").is_file()


def test_a_refused_start_leaves_no_folder(config, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"messages": 5}\n')
    bad = replace(config, data=DataConfig(train=str(tmp_path / "rows.jsonl")))
    with pytest.raises(PosttrainError, match="messages is a number"):
        run(bad, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()  # the caller's own is left
    with pytest.raises(PosttrainError, match="messages is a number"):
        run(bad, tmp_path / "run")
    assert (tmp_path / "run").is_dir()


def test_a_folder_without_pad_token_trains_and_answers(config, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    for name, key in (("tokenizer_config.json", "pad_token"), ("config.json", "pad_token_id")):
        settings = json.loads((folder / name).read_text())
        del settings[key]
        (folder / name).write_text(json.dumps(settings))
    assert "pad_token" not in load_tokenizer(folder).special_tokens_map
    own = replace(
        config,
        model=ModelConfig(path=str(folder)),
        eval=replace(config.eval, generate_rows=3, max_new_tokens=4),
    )
    given = replace(config, eval=own.eval)
    for name, each in (("without", own), ("with", given)):
        assert run(each, tmp_path / name, progress=False).completed

    without, given = (
        [
            {key: value for key, value in json.loads(line).items() if key.endswith("loss")}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("without", "with")
    )
    assert without == given and len(given) == 4
    answers = [(tmp_path / name / "answers.json").read_text() for name in ("without", "with")]
    assert answers[0] == answers[1] and len(json.loads(answers[0])["samples"]) == 3


@pytest.mark.parametrize("begun", ["metrics.jsonl", "checkpoints", "logs/plan.json"])
def test_what_was_begun_is_never_removed(begun, tmp_path):
    folder = tmp_path / "run"
    (folder / begun).mkdir(parents=True)
    assert not discard_refused(folder, PosttrainError("no"))
    (folder / begun).rmdir()
    assert not discard_refused(folder, PosttrainError("no", where=str(folder / "logs")))
    assert folder.is_dir()
    assert discard_refused(folder, PosttrainError("no"))
    assert not folder.exists()


def test_a_cluster_is_refused_before_anything_is_made(config, tmp_path):
    with pytest.raises(ConfigError) as failure:
        run(replace(config, cluster=Ray()), tmp_path / "run")
    assert failure.value.where == "cluster"
    assert "posttrain train" in failure.value.fix
    assert not (tmp_path / "run").exists()


def test_a_stopped_training_is_not_finished(tmp_path):
    folder = leave(tmp_path / "run", outcome="stopped", step=2, total_steps=9)
    assert finish(RunConfig(), folder) == Outcome(completed=False, step=2, total_steps=9)
    assert not (folder / "FINISHED").exists() and not (folder / "report.html").exists()


def test_the_alarm_that_ended_a_run_is_said_and_kept(tmp_path):
    alarm = "low_loss: too low"
    folder = leave(tmp_path / "run", outcome="completed", step=4, total_steps=9, early_stop=alarm)
    said: list[str] = []
    finish(RunConfig(), folder, said.append)
    assert said == [f"ended early at step 4: {alarm}"]
    assert json.loads((folder / "FINISHED").read_text()) == {"reason": "early_stop", "step": 4}


@pytest.mark.parametrize("text", ["", "[]", '{"outcome": "completed"}'])
def test_a_training_that_did_not_say_how_it_ended(text, tmp_path):
    folder = leave(tmp_path / "run")
    (folder / "logs" / "outcome.json").write_text(text)
    with pytest.raises(PosttrainError, match="without saying how") as failure:
        finish(RunConfig(), folder)
    assert failure.value.where == str(folder / "logs" / "outcome.json")
    assert f"posttrain run {folder}" in failure.value.fix
