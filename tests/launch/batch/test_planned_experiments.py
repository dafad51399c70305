"""The experiments of a 70B: each is planned to fit on its hardware, and its job is what it says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from posttrain_launch.cli import main

from posttrain_dist.models.folder import resolve

# nodes, GPUs of a node, and what the config must be
EXPERIMENTS = {
    "llama3_70b_full": (4, 8, {"tuning": "full", "stage": 3, "checkpointing": "selective"}),
    "llama3_70b_lora": (1, 8, {"tuning": "lora", "stage": 3, "checkpointing": "selective"}),
    "llama3_70b_qlora": (1, 1, {"tuning": "lora", "stage": None, "checkpointing": "full"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of that shape, with the tokenizer and weights of a small one."""
    path = tmp_path_factory.mktemp("llama3-70b")
    shutil.copytree(resolve("tiny_base"), path, dirs_exist_ok=True)
    shutil.copy(resolve("shape:llama3-70b") / "config.json", path)
    return path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_fits_and_renders_its_job(name, folder, tmp_path, monkeypatch, capsys):
    nodes, gpus, kind = EXPERIMENTS[name]
    monkeypatch.chdir(tmp_path)
    words = [f"+experiment={name}", f"model.path={folder}", "cluster.time=01:00:00"]
    assert main(["submit", *words, "--dry-run"]) == 0
    script = capsys.readouterr().out
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    assert (asked["nodes"], asked["gpus-per-node"]) == (str(nodes), str(gpus))
    (run,) = (tmp_path / "outputs" / name).iterdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["tuning"]["kind"] == kind["tuning"]
    assert config["tuning"].get("quantize", "none") == ("nf4" if "qlora" in name else "none")
    assert config["engine"].get("stage") == kind["stage"]
    assert config["model"]["activation_checkpointing"] == kind["checkpointing"]
    assert (config["train"]["dtype"], config["data"]["max_length"]) == ("bfloat16", 8192)
    plan = json.loads((run / "plan.json").read_text())["plan"]
    assert plan["fits"] and plan["workers"] == nodes * gpus
    # Weights, gradients, masters and moments are the least that full tuning can take.
    state = 16 * plan["parameters"] / plan["workers"] if name.endswith("full") else 0
    assert state < plan["device"]["allocated_bytes"] < plan["capacity_bytes"]
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672 + 2 * 8192
    assert plan["parameters"] == 2 * 128_256 * 8192 + 80 * layer + 8192
    assert "does not fit" not in (run / "plan.html").read_text()


def test_a_plan_for_a_preset_of_slurm_ends_with_its_job(capsys):
    words = ["model.path=shape:llama3-8b", "hardware=h100x8", "train.tokens=1000000000"]
    assert main(["plan", *words, "cluster=slurm_gres", "cluster.nodes=2"]) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert command[:2] == ["posttrain", "submit"]
    assert "cluster=slurm_gres" in command and "cluster=slurm" not in command
    assert [word for word in command if re.fullmatch(r"cluster\.time=\d+:00:00", word)]
