"""A command does its work once: one composition, one check of the model, a short way to train()."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from posttrain_launch.cli import main

import posttrain_dist.train
from posttrain_dist.models import folder as model_folder

ROOT = Path(__file__).resolve().parents[2]
OWN = [ROOT / "posttrain_dist", ROOT / "launch", ROOT / "kernels"]


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The overrides of every composition that Hydra makes."""
    made: list[list[str]] = []
    compose = ConfigLoaderImpl._load_configuration_impl

    def counted(self: ConfigLoaderImpl, *, overrides: list[str], **options: object) -> object:
        made.append(overrides)
        return compose(self, overrides=overrides, **options)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counted)
    return made


@pytest.mark.parametrize("asked", [["--cfg", "job"], ["--cfg", "all"], ["--help"]], ids=" ".join)
def test_what_is_shown_is_composed_once(asked, compositions, capsys):
    assert main(["train", "engine=zero3", "train.steps=7", *asked]) == 0
    assert "steps: 7\n" in capsys.readouterr().out
    assert compositions == [["engine=zero3", "train.steps=7"]]


def test_a_command_that_fails_its_checks_is_composed_once(compositions, capsys):
    assert main(["train", "train.batch_size=0", "model.path=/no/model"]) == 2
    assert "2 problems" in capsys.readouterr().err
    assert len(compositions) == 1


def test_a_run_composes_once_and_checks_its_model_once(
    compositions, tiny_llama, rows_file, tmp_path, monkeypatch
):
    reads: list[Path] = []
    read_object, train = model_folder._read_object, posttrain_dist.train.train
    calls: list[str] = []

    def counted_read(file: Path, fix: str) -> object:
        reads.append(file)
        return read_object(file, fix)

    def watched_train(*arguments: object, **options: object) -> None:
        stack = traceback.extract_stack()
        calls.extend(
            frame.name
            for frame in stack
            if any(Path(frame.filename).is_relative_to(folder) for folder in OWN)
        )
        train(*arguments, **options)

    model_folder._read_config.cache_clear()
    monkeypatch.setattr(model_folder, "_read_object", counted_read)
    monkeypatch.setattr(posttrain_dist.train, "train", watched_train)
    overrides = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={tmp_path}"]
    overrides += ["train.steps=1", "data.max_length=64", "train.batch_size=2", "logging.wandb=off"]
    assert main(["train", *overrides]) == 0
    [run] = tmp_path.glob("run/2*")
    assert (run / "FINISHED").is_file()
    assert compositions == [overrides]
    # Before the run folder is made, for the preparation, to build batches, and to load the weights.
    assert reads == [tiny_llama / "config.json"]
    assert calls[0] == "main"
    assert len(calls) <= 5, calls
