"""The files of this project, for the tests that read them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Package -> folder.
LIBRARY = {
    "posttrain_dist": ROOT / "posttrain_dist",
    "posttrain_kernels": ROOT / "kernels/posttrain_kernels",
    "posttrain_launch": ROOT / "launch/posttrain_launch",
}
# Only size and names are checked outside the packages.
OTHERS = ("conf", "slurm", "tests", "benchmarks", "tools")


def source_files(*folders: Path) -> list[Path]:
    """Python and shell files below some folders, sorted."""
    found = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return [path for path in found if path.suffix in {".py", ".sh", ".sbatch"}]


def name_of(path: Path) -> str:
    """A path below the root, as a test is named after it."""
    return str(path.relative_to(ROOT))


LIBRARY_FILES = [path for path in source_files(*LIBRARY.values()) if path.suffix == ".py"]
ALL_FILES = source_files(*LIBRARY.values(), *(ROOT / name for name in OTHERS))


@cache
def text_of(path: Path) -> str:
    """What a file holds."""
    return path.read_text(encoding="utf-8")


@cache
def tree_of(path: Path) -> ast.Module:
    """What a Python file says; nobody may change it."""
    return ast.parse(text_of(path))


def faults(check: Callable[[Path], Any], paths: Iterable[Path]) -> dict[str, Any]:
    """File -> what a check finds in it, of those where it finds something.

    One test for all files: a case for each would be two thousand more.
    """
    return {name_of(path): found for path in paths if (found := check(path))}


def module_of(path: Path) -> str:
    """The dotted name of a library file."""
    package, folder = next((p, f) for p, f in LIBRARY.items() if path.is_relative_to(f))
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))
