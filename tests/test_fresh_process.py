"""What a fresh process of the console script imports, and what it must not find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_script(folder: Path, source: str) -> object:
    """Run a script as an installed console script runs: sys.path[0] is its folder, not here."""
    script = folder / "script.py"
    script.write_text(source)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "module", ["posttrain_dist.config", "posttrain_dist.preflight", "posttrain_launch.cli"]
)
def test_the_command_line_starts_without_heavy_imports(module: str, tmp_path: Path) -> None:
    heavy = ["torch", "transformers", "ray", "deepspeed"]
    source = f"import json, sys, {module}\nfound = [m for m in {heavy} if m in sys.modules]\n"
    assert run_script(tmp_path, source + "print(json.dumps(found))") == []


@pytest.mark.parametrize("name", ["kernels", "launch", "tests", "slurm", "conf"])
def test_folders_of_the_repository_are_not_importable(name: str, tmp_path: Path) -> None:
    """transformers probes for a package `kernels`: ours must not answer."""
    source = f"""
import importlib.util, json
spec = importlib.util.find_spec({name!r})
places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
print(json.dumps([place for place in places if place]))
"""
    places = run_script(tmp_path, source)
    assert isinstance(places, list)
    assert [place for place in places if Path(place).is_relative_to(ROOT / name)] == []
