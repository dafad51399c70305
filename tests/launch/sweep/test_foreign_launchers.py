"""Launchers and sweepers of Hydra that are not ours: Hydra drives them, or it is said why not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from posttrain_launch.cli import main

LAUNCHED: list[list[str]] = []


class Foreign(BasicLauncher):
    """A launcher that somebody wrote."""

    def launch(self, job_overrides, initial_job_idx):
        LAUNCHED.extend(list(each) for each in job_overrides)
        return super().launch(job_overrides, initial_job_idx)


Foreign.__module__ = "hydra_plugins.foreign"  # the one place that Hydra takes plugins from


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    package, module = ModuleType("hydra_plugins"), ModuleType(Foreign.__module__)
    package.__path__, package.foreign, module.Foreign = [], module, Foreign
    monkeypatch.setitem(sys.modules, "hydra_plugins", package)
    monkeypatch.setitem(sys.modules, Foreign.__module__, module)
    Plugins.instance().register(Foreign)
    node = {"_target_": f"{Foreign.__module__}.Foreign"}
    for group in ("hydra/launcher", "hydra/sweeper"):
        ConfigStore.instance().store(group=group, name="foreign", node=node)
    LAUNCHED.clear()


def test_a_foreign_launcher_is_driven_by_hydra(tiny_llama: Path, tmp_path: Path, capfd):
    words = [f"model.path={tiny_llama}", "data.train=/no/rows", f"output_root={tmp_path}/out"]
    words += ["hydra/launcher=foreign", "optimizer.lr=1e-4,2e-4", "logging.wandb=off"]
    assert main(["train", "-m", *words]) == 1
    shown = capfd.readouterr()
    rates = [next(o for o in each if o.startswith("optimizer.lr")) for each in LAUNCHED]
    assert rates == ["optimizer.lr=0.0001", "optimizer.lr=0.0002"]
    assert shown.err.count("error: /no/rows: no file has this name") == 2
    rows = [line.split() for line in shown.out.splitlines() if line.startswith("optimizer.lr")]
    assert [row[:3] for row in rows] == [
        ["optimizer.lr=0.0001", "failed", "(2)"],
        ["optimizer.lr=0.0002", "failed", "(2)"],
    ]


@pytest.mark.parametrize(
    ("typed", "where"),
    [
        (["hydra/launcher=foreign", "hydra/sweeper=posttrain_optuna"], "hydra/launcher"),
        (["hydra/launcher=ray", "hydra/sweeper=foreign"], "hydra/sweeper"),
    ],
)
def test_ours_and_foreign_ones_do_not_go_together(typed, where, capsys, tmp_path):
    words = [f"output_root={tmp_path}/out", "optimizer.lr=1e-4,2e-4"]
    assert main(["train", "-m", *words, *typed]) == 2
    assert f"error: {where}: is not of posttrain" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
