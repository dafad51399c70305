"""Everything in conf/ composes, and holds differences only."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from posttrain_launch.compose.composer import Composed, Composer
from posttrain_launch.compose.problems import compose_checked

from posttrain_dist.config import GROUPS, RunConfig

CONF = Path(__file__).resolve().parent.parent / "conf"
ASSETS = CONF.parent / "posttrain_dist" / "assets"
FILES = sorted(CONF.rglob("*.yaml"))
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
OPTIONS = [f for f in FILES if f.parent != CONF and f.parent.name != "experiment"]


def name_of(file: Path) -> str:
    return str(file.relative_to(CONF).with_suffix(""))


def values_of(file: Path) -> dict[str, Any]:
    found = yaml.safe_load(file.read_text()) or {}
    found.pop("defaults", None)
    found.pop("hydra", None)
    return found


def defaults_of(owner: type) -> dict[str, Any]:
    return {f.name: getattr(owner(), f.name) for f in dataclasses.fields(owner)}


def compose(overrides: list[str], *, contradictions: bool = True) -> Composed:
    with Composer() as composer:
        return compose_checked(composer, overrides, contradictions=contradictions)


def test_every_slot_has_yaml_for_its_options_and_a_default():
    chosen = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    groups = {key for d in chosen if isinstance(d, dict) for key in d if "override" not in key}
    assert groups == set(GROUPS)
    for group in GROUPS:
        assert list((CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("file", OPTIONS, ids=name_of)
def test_an_option_composes_and_differs_from_its_schema(file: Path):
    group, option = file.parent.name, file.stem
    schema = yaml.safe_load(file.read_text())["defaults"][0]
    kind = schema.removeprefix(f"/schema/{group}/").removesuffix("@_here_")
    with Composer() as composer:
        composed = composer.compose([f"{group}={option}"])
    defaults = defaults_of(GROUPS[group][kind])
    assert composed[group].keys() == defaults.keys()
    for key, value in values_of(file).items():
        assert value != defaults[key], f"{file}: {key} is the default"
        chosen = composed[group][key]
        assert getattr(chosen, "name", chosen) == value


@pytest.fixture
def earlier_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an experiment that goes on from the demo finds below outputs/."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "demo" / "2026-11-30_10-00-00"
    run.mkdir(parents=True)
    shutil.copytree(ASSETS / "tiny_base", run / "export")
    (run / "FINISHED").write_text("{}", encoding="utf-8")


@pytest.mark.usefixtures("earlier_demo")
@pytest.mark.parametrize("file", EXPERIMENTS, ids=name_of)
def test_an_experiment_composes_and_holds_differences_only(file: Path):
    composed = compose([f"+experiment={file.stem}"])
    base = compose(
        [f"{g}={o}" for g, o in composed.choices.items() if g != "experiment"],
        contradictions=False,
    )

    def compare(values: dict[str, Any], mine: Any, default: Any, path: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                compare(value, getattr(mine, key), getattr(default, key), f"{path}{key}.")
            else:
                assert getattr(mine, key) != getattr(default, key), f"{path}{key} is the default"

    compare(values_of(file), composed.config, base.config, "")
    plain = compose([])
    for entry in yaml.safe_load(file.read_text()).get("defaults", []):
        for group, option in entry.items():
            name = group.removeprefix("override /")
            assert plain.choices[name] != option, f"{name}={option} is the default"


@pytest.mark.usefixtures("earlier_demo")
@pytest.mark.parametrize("file", EXPERIMENTS, ids=name_of)
def test_the_first_comment_of_an_experiment_is_its_command(file: Path):
    lines = file.read_text().splitlines()
    assert lines[0] == "# @package _global_"  # Hydra wants it first
    commands = []
    for line in lines[1:]:
        if not line.startswith("# ") or line == "#":
            break
        commands.append(shlex.split(line.removeprefix("# ")))
    word = f"+experiment={file.stem}"
    starts = [c for c in commands if c[:2] in (["posttrain", "train"], ["posttrain", "submit"])]
    assert starts and all(word in c for c in starts), f"{file}: `posttrain train {word}` is missing"
    for _, verb, *words in starts:
        words += ["cluster=slurm"] * (verb == "submit" and file.stem.endswith("qlora"))
        assert isinstance(compose(words).config, RunConfig)
