"""The run folder is new, whole, and says everything that the run is."""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from posttrain_launch.compose.composer import Composed, Composer
from posttrain_launch.compose.problems import compose_checked
from posttrain_launch.run import freeze as freezing
from posttrain_launch.run.freeze import freeze

from posttrain_dist.config import RunConfig
from posttrain_dist.engine.ds_config import deepspeed_config
from posttrain_dist.errors import ConfigError


def composed(*overrides: str) -> Composed:
    with Composer() as composer:
        return compose_checked(composer, list(overrides))


def test_the_frozen_config_is_read_back_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    ds_json = tmp_path / "ds.json"
    ds_json.write_text('{"wall_clock_breakdown": true}')
    words = ["model.path=m", "data.train=d/*.jsonl", 'data.eval="~/e.jsonl"', "engine=zero2"]
    words += ["engine.config=ds.json", "output_root=out", "name=x", "train.resume=old/step-1"]
    source = composed(*words)
    folder = freeze(source, "posttrain train ...")

    assert folder.parent == tmp_path / "out" / "x"
    config = RunConfig.from_yaml((folder / "config.yaml").read_text())
    assert config.model.path == str(tmp_path / "m")
    assert config.data.train == str(tmp_path / "d/*.jsonl")
    assert config.data.eval == "/home/someone/e.jsonl"
    # A copy, so that a later edit does not change what this run is.
    assert config.engine.config == str(folder / "deepspeed.json")
    ds_json.unlink()
    merged = deepspeed_config(config.engine, clip=1.0, bf16=False)
    assert merged["wall_clock_breakdown"] is True and merged["zero_optimization"]["stage"] == 2
    assert config.train.resume == str(tmp_path / "old/step-1")
    assert config.output_root == str(tmp_path / "out")
    # Nothing else has changed.
    given = source.config
    assert replace(
        config,
        model=given.model,
        data=given.data,
        engine=given.engine,
        train=given.train,
        output_root=given.output_root,
    ) == replace(given, optimizer=replace(given.optimizer, lr=1e-5))

    raw = yaml.safe_load((folder / "config.yaml").read_text())
    assert raw["choices"]["engine"] == "zero2"
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == words


def test_the_adapter_to_go_on_with_is_named_by_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = freeze(composed("tuning=lora", "tuning.init_from=old/adapter"), "posttrain train ...")
    config = RunConfig.from_yaml((folder / "config.yaml").read_text())
    assert config.tuning.init_from == str(tmp_path / "old/adapter")


def test_reserved_names_are_no_paths(tmp_path):
    folder = freeze(composed(f"output_root={tmp_path}", "data.eval=embedded"), "c")
    config = RunConfig.from_yaml((folder / "config.yaml").read_text())
    assert (config.model.path, config.data.train, config.data.eval) == (
        "tiny_base",
        "embedded",
        "embedded",
    )
    words = (f"output_root={tmp_path}", "model.path=shape:qwen3-8b")
    folder = freeze(composed(*words), "c", force=True)
    config = RunConfig.from_yaml((folder / "config.yaml").read_text())
    assert config.model.path == "shape:qwen3-8b"


def test_run_json_tells_the_lineage(tmp_path):
    folder = freeze(composed(f"output_root={tmp_path}", "name=n"), "posttrain train name=n")
    lineage = json.loads((folder / "run.json").read_text())
    assert lineage["command"] == "posttrain train name=n"
    assert lineage["id"] == f"n-{folder.name}"
    digest = hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest()
    assert lineage["hashes"] == {"config": digest}
    assert {"python", "torch", "deepspeed", "ray"} <= lineage["versions"].keys()
    assert len(lineage["wandb_id"]) == 8
    assert {path.name for path in folder.iterdir()} == {  # nothing half written
        "config.yaml",
        "logs",
        "overrides.yaml",
        "plan.json",
        "run.json",
    }


def test_runs_of_the_same_second_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(freezing, "git_state", lambda _: None)
    source = composed(f"output_root={tmp_path}")
    gate = threading.Barrier(6)

    def one(_: int) -> Path:
        gate.wait()
        return freeze(source, "c")

    with ThreadPoolExecutor(6) as pool:
        folders = list(pool.map(one, range(6)))
    assert len(set(folders)) == 6
    assert all((folder / "config.yaml").is_file() for folder in folders)
    ids = {json.loads((f / "run.json").read_text())["wandb_id"] for f in folders}
    assert len(ids) == 6


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_root: .*cannot be made"):
        freeze(composed(f"output_root={tmp_path}/file"), "c")
