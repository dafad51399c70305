"""Overrides on the command line become the RunConfig that they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from posttrain_launch.cli import main
from posttrain_launch.compose.composer import Composed, Composer
from posttrain_launch.compose.problems import compose_checked

from posttrain_dist.config import Local, Ray, RunConfig, Slurm, complete
from posttrain_dist.engine import AdamW, DeepSpeed, Schedule, Single
from posttrain_dist.errors import PosttrainError
from posttrain_dist.objectives.pretrain import Pretrain


def composed(*overrides: str, config_dir: str | None = None) -> Composed:
    with Composer(config_dir) as composer:
        return compose_checked(composer, list(overrides))


def compose(*overrides: str) -> RunConfig:
    return composed(*overrides).config


def test_nothing_typed_is_the_defaults_of_the_dataclasses():
    assert complete(compose()) == complete(RunConfig())


def test_keys_of_the_users_own() -> None:
    """A dict of the config takes any name, as a whole and one by one; nothing else does."""
    assert compose("data.columns={messages: dialog}").data.columns == {"messages": "dialog"}
    assert compose("data.columns.messages=dialog").data.columns == {"messages": "dialog"}
    deep = {"enable_thinking": False, "style": {"tone": ["dry", 1]}}
    typed = "template.variables={enable_thinking: false, style: {tone: [dry, 1]}}"
    assert compose("template=qwen", typed).template.variables == deep
    more = compose("template.variables.a=1", "+template.variables.b.c=2").template.variables
    assert more == {"a": 1, "b": {"c": 2}}
    frozen = RunConfig.from_yaml(compose(typed).to_yaml())
    assert frozen.template.variables == deep
    with pytest.raises(PosttrainError, match=r"data\.columns\.messages: \[1\] is not text"):
        compose("data.columns.messages=[1]", "train.steps=3")
    with pytest.raises(PosttrainError, match=r"template\.varables\.x: unknown key"):
        compose("template.varables.x=1")


@pytest.mark.parametrize(
    ("option", "engine"),
    [
        ("single", Single()),
        ("zero0", DeepSpeed(stage=0)),
        ("zero1", DeepSpeed(stage=1)),
        ("zero2", DeepSpeed(stage=2)),
        ("zero3", DeepSpeed(stage=3)),
        ("zero3_offload", DeepSpeed(stage=3, offload=True)),
    ],
)
def test_each_engine_option_is_its_dataclass(option, engine):
    assert compose(f"engine={option}").engine == engine


def test_values_reach_their_typed_place():
    config = compose(
        "objective=pretrain",
        "cluster=slurm",
        "cluster.nodes=3",
        'cluster.extra=["--qos=high"]',
        "optimizer.schedule=linear",
        "optimizer.lr=1e-4",
        "train.epochs=1.5",
        "data.eval=null",
        'name="a(1)"',
    )
    assert config.objective == Pretrain()
    assert config.cluster == Slurm(nodes=3, extra=["--qos=high"])
    assert config.optimizer == AdamW(lr=1e-4, schedule=Schedule.linear)
    assert (config.train.epochs, config.data.eval, config.name) == (1.5, None, "a(1)")


def test_the_users_own_folder_of_yaml(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /cluster: ray\ncluster:\n  workers: 5\n"
    )
    found = composed("+experiment=mine", "seed=7", "engine=zero1", config_dir=str(tmp_path))
    assert found.config.cluster == Ray(workers=5)
    assert found.config.seed == 7
    assert found.choices["experiment"] == "mine"
    assert found.choices["cluster"] == "ray"


def test_cfg_job_prints_the_composed_yaml(capsys):
    assert main(["train", "train.steps=3", "--cfg", "job", "--package", "train"]) == 0
    assert "steps: 3\n" in capsys.readouterr().out


def test_train_without_arguments_is_the_demo_and_says_so(capsys):
    assert main(["train", "--cfg", "job"]) == 0
    shown = capsys.readouterr()
    assert "+experiment=demo" in shown.err
    assert "name: demo\n" in shown.out


def test_experiment_is_found_with_and_without_plus(capsys):
    for word in ("experiment=demo", "+experiment=demo"):
        assert main(["train", word, "--cfg", "job", "-p", "engine"]) == 0
        assert "persistence_threshold: 0\n" in capsys.readouterr().out


def test_submit_takes_slurm_unless_told_otherwise(capsys):
    assert main(["submit", "--cfg", "job", "-p", "cluster"]) == 0
    assert "nodes: 1" in capsys.readouterr().out
    assert isinstance(compose().cluster, Local)
