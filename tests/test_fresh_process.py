"""What a fresh process imports, and what it must not find: one process answers for all modules.

Imports add up, so the modules stand in the order of what they may bring along.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "transformers", "deepspeed", "wandb", "ray"]
CONFIG = ["omegaconf"]
HYDRA = ["hydra", *CONFIG]
DRIVER = "posttrain_launch.run"
# Module -> which packages are there after its import, of HEAVY and HYDRA.
ALLOWED = {
    "posttrain_launch.cli": [],
    # What tokenises: it loads neither the configuration nor anything of the model.
    "posttrain_dist.prepare.processes.fork_server": [],
    "posttrain_dist.config": CONFIG,
    "posttrain_dist.prepare.build_dataset": CONFIG,
    "posttrain_dist.prepare.data_report": CONFIG,
    "posttrain_dist.preflight": CONFIG,
    "posttrain_dist.run": CONFIG,
    # A Ray worker, until it is placed.
    "posttrain_launch.ray.workers": CONFIG,
    "posttrain_launch.compose.hydra_app": HYDRA,
    # The driver of any run until it reads the tokenizer, and all of it that serves Ray.
    "posttrain_launch.run.driver": HYDRA,
    "posttrain_dist.report.data.prepare_progress": HYDRA,
    "posttrain_launch.ray.child": HYDRA,
    **{
        f"posttrain_launch.commands.{path.parent.name}.{path.stem}": HYDRA
        for path in sorted((ROOT / "launch/posttrain_launch/commands").glob("*/[a-z]*.py"))
    },
    # The Ray job, and the controller that Ray Train runs: only workers compute.
    "posttrain_launch.ray.job": ["ray", *HYDRA],
    "posttrain_launch.ray.trainer": ["ray", *HYDRA],
}
FOLDERS = ["kernels", "launch", "tests", "slurm", "conf"]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a script sees that runs as a console script: sys.path[0] is its folder, not here."""
    script = tmp_path_factory.mktemp("fresh") / "script.py"
    script.write_text(f"""
import contextlib, importlib, importlib.util, io, json, sys

places, present = {{}}, {{}}
for name in {FOLDERS}:
    spec = importlib.util.find_spec(name)
    found = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    places[name] = [place for place in found if place]
for name in {list(ALLOWED)}:
    module = importlib.import_module(name)
    if name == "posttrain_launch.cli":  # the page that must be quick
        with contextlib.redirect_stdout(io.StringIO()) as page:
            module.main(["--help"])
    present[name] = [package for package in {HEAVY + HYDRA} if package in sys.modules]
print(json.dumps({{"places": places, "present": present, "help": page.getvalue()}}))
""")
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


@pytest.mark.parametrize("module", ALLOWED)
def test_heavy_packages_wait_until_they_are_used(module: str, fresh: dict[str, Any]) -> None:
    assert fresh["present"][module] == ALLOWED[module]


def test_the_page_of_all_verbs_needs_no_package(fresh: dict[str, Any]) -> None:
    assert "posttrain train" in fresh["help"]
    assert fresh["present"]["posttrain_launch.cli"] == []


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_the_repository_are_not_importable(name: str, fresh: dict[str, Any]) -> None:
    """transformers probes for a package `kernels`: ours must not answer."""
    places = fresh["places"][name]
    assert [place for place in places if Path(place).is_relative_to(ROOT / name)] == []
