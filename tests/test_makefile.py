"""`make demo` and `make test` install once; only a change of what they install from undoes that."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def plan(folder: Path, target: str) -> list[str]:
    # Not as a part of the `make test` that may run this.
    environment = {key: text for key, text in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-n", target]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_second_call_installs_nothing(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (1000, 1000))
    demo, test = ".venv/bin/posttrain train +experiment=demo", ".venv/bin/python -m pytest -n 3"
    first = plan(tmp_path, "demo")
    assert first[-1] == demo
    assert any("pip install" in line and "constraints.txt" in line for line in first)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    assert plan(tmp_path, "demo") == [demo]
    assert [line.strip() for line in plan(tmp_path, "test")] == [test]
    os.utime(tmp_path / ".venv" / ".installed", (2000, 2000))
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(tmp_path / name, (3000, 3000))
        assert any("pip install" in line for line in plan(tmp_path, "demo"))
        os.utime(tmp_path / name, (1000, 1000))
