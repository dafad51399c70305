"""A wheel, installed away from the checkout, has all its data and runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pip(*words: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools leaves build/ beside its source, and old files in it.
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("README.md", "LICENSE"):
        (source / name).touch()
    out = work / "out"
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source), cwd=work)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("target")
    pip("install", "--no-deps", "--target", str(target), str(wheel), cwd=target)
    return target


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def test_the_wheel_holds_every_file_that_is_read_at_run_time(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"posttrain_launch/conf/{f.relative_to(ROOT / 'conf').as_posix()}"
        for f in (ROOT / "conf").rglob("*.yaml")
    }
    assets = ROOT / "posttrain_dist" / "assets"
    wanted |= {
        f"posttrain_dist/assets/{f.relative_to(assets).as_posix()}"
        for f in assets.rglob("*")
        if f.is_file() and "__pycache__" not in f.parts
    }
    wanted |= {f"posttrain_launch/slurm/{f.name}" for f in (ROOT / "slurm").glob("*.sh")}
    for package, folder in (
        ("posttrain_dist", "posttrain_dist"),
        ("posttrain_launch", "launch/posttrain_launch"),
        ("posttrain_kernels", "kernels/posttrain_kernels"),
    ):
        wanted |= {
            f"{package}/{f.relative_to(ROOT / folder).as_posix()}"
            for f in (ROOT / folder).rglob("*.py")
        }
    assert wanted - names == set()
    # The folders of the checkout are no importable names of their own.
    assert not {name.split("/")[0] for name in names} & {
        "conf", "launch", "kernels", "slurm", "tests", "benchmarks",
    }  # fmt: skip
    # Nor do the generators of the embedded data come along, under any name.
    generators = {path.name for path in (ROOT / "tools").glob("*.py")}
    assert "make_embedded.py" in generators
    assert not generators & {Path(name).name for name in names}


def test_it_runs_away_from_the_checkout(installed: Path, tmp_path: Path):
    where = run(installed, tmp_path, "-c", "import posttrain_launch as p; print(p.__file__)")
    assert where.stdout.startswith(str(installed))
    shown = run(installed, tmp_path, "-m", "posttrain_launch.cli", "--help")
    assert shown.returncode == 0 and "posttrain train" in shown.stdout
    composed = run(installed, tmp_path, "-m", "posttrain_launch.cli", "train", "--cfg", "job")
    assert composed.returncode == 0, composed.stderr
    assert "name: demo\n" in composed.stdout
    assert str(ROOT) not in composed.stdout + composed.stderr
