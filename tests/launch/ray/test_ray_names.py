"""The folders kernels/, launch/, tests/, slurm/, conf/ are no packages to a Ray worker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.ray
def test_no_folder_of_the_repository_resolves_in_a_ray_worker(tmp_path):
    # Copied out: Python puts the folder of a script first on its path, and tests/ is not it.
    script = tmp_path / "ray_names.py"
    script.write_text((ROOT / "tests" / "workers" / "ray_names.py").read_text())
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(script), str(run_folder)],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(re.search(r"^NAMES (.*)$", done.stdout, re.MULTILINE).group(1))
    for name in ("kernels", "launch", "tests", "slurm", "conf"):
        assert not [place for place in found[name] if place.startswith(str(ROOT))], name
    # The check can see: what is installed does resolve into the checkout.
    assert str(ROOT / "conf" / "__init__.py") in found["posttrain_launch.conf"]
