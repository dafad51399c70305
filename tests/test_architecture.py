"""Who imports whom: layers, circles, and the one place of each heavy dependency.

Imports are read from the source, also those inside functions. Those under `if TYPE_CHECKING:`
never run, so that the table of layers exempts them; circles of files count them too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from source_tree import LIBRARY, LIBRARY_FILES, faults, module_of, name_of, text_of, tree_of

LAYERS = {
    "posttrain_launch": 9,
    "run": 8,
    "attempts": 7,
    "together": 7,
    "train": 6,
    "merge": 6,
    **dict.fromkeys(
        (
            "hooks",
            "rehearsal",
            "reference",
            "prepare",
            "rollouts",
            "evaluation",
            "annotation",
            "synthesis",
            "export",
            "report",
            "assets",
        ),
        5,
    ),
    **dict.fromkeys(("build", "planner", "preflight", "judge"), 4),
    **dict.fromkeys(("loop", "config"), 3),
    **dict.fromkeys(
        (
            "tuning",
            "objectives",
            "engine",
            "checkpoint",
            "metrics",
            "diagnosis",
            "generation",
            "verify",
        ),
        2,
    ),
    **dict.fromkeys(("data", "models"), 1),
    **dict.fromkeys(("flow", "errors", "dist", "files", "logs"), 0),
}
KERNEL_USERS = {"objectives", "tuning", "build", "posttrain_launch"}
# Dependency -> modules, with all below them, that may import it.
CONFINED = {
    "ray": ("posttrain_launch",),
    "hydra": ("posttrain_launch",),
    "deepspeed": ("posttrain_dist.engine",),
    "bitsandbytes": (
        "posttrain_dist.engine",
        "posttrain_dist.tuning",
        "posttrain_dist.models.quantized",
    ),
    "peft": ("posttrain_dist.tuning", "posttrain_dist.generation"),
    "wandb": ("posttrain_dist.metrics",),
    "triton": ("posttrain_kernels",),
}

# --------------------------------------------------------------------------- reading imports


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node`, leaving out what stands under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from running_nodes(other)
        else:
            yield child
            yield from running_nodes(child)


@cache
def imported(source: str, module: str, is_package: bool = False) -> list[tuple[int, str]]:
    """(line, dotted name) of each import; of `from a import b` the name is `a.b`."""
    return list(_imported(source, module, is_package))


def _imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    for node in running_nodes(ast.parse(source)):
        for name in names_imported(node, module, is_package):
            yield node.lineno, name  # type: ignore[attr-defined]


def names_imported(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a node of `module` imports; of `from a import b` the name is `a.b`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = [node.module] if node.module else []
        if node.level:
            parents = module.split(".")
            cut = len(parents) - node.level + is_package
            base = parents[:cut] + base
        yield from (".".join([*base, alias.name]) for alias in node.names)
    elif isinstance(node, ast.Call) and node.args:
        called, name = ast.unparse(node.func), node.args[0]
        if called.endswith(("import_module", "__import__")) and isinstance(name, ast.Constant):
            yield str(name.value)


def unit_of(name: str) -> str | None:
    """The row of LAYERS that a dotted name belongs to, or posttrain_kernels.

    None for what is not ours, and for the root of posttrain_dist, which holds the version only.
    """
    package, _, rest = name.partition(".")
    if package != "posttrain_dist":
        return package if package in LIBRARY else None
    unit, folder = rest.partition(".")[0], LIBRARY[package]
    exists = (folder / unit).is_dir() or (folder / f"{unit}.py").exists()
    return unit if unit and (unit in LAYERS or exists) else None


def refusal(unit: str | None, target: str) -> str:
    """Why `unit` may not import `target`; empty where it may."""
    if unit == "posttrain_kernels":
        return "kernels import nothing of ours"
    if unit is None:
        return "the root of posttrain_dist imports nothing of ours"
    if target == "posttrain_kernels":
        return "" if unit in KERNEL_USERS else f"only {sorted(KERNEL_USERS)} import kernels"
    if unit not in LAYERS or target not in LAYERS:
        return "has no row in the table of layers"
    own, other = LAYERS[unit], LAYERS[target]
    return "" if other < own else f"layer {own} imports only what is below it, this is {other}"


def upward_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports that the table of layers does not allow, as `line N: name (why)`."""
    unit = unit_of(module)
    targets = [(*found, unit_of(found[1])) for found in imported(source, module, is_package)]
    return [
        f"line {line}: {name} ({why})"
        for line, name, target in targets
        if target is not None and target != unit and (why := refusal(unit, target))
    ]


def misplaced_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of confined dependencies from outside their place."""
    return [
        f"line {line}: {name} (only in {', '.join(places)})"
        for line, name in imported(source, module, is_package)
        for places in [CONFINED.get(name.partition(".")[0])]
        if places and not any(f"{module}.".startswith(f"{place}.") for place in places)
    ]


def foreign_to_ground(source: str, module: str) -> list[str]:
    """Imports of layer 0 beside torch, the standard library and ours."""
    known = {"torch", "posttrain_dist", *sys.stdlib_module_names}
    return [
        f"line {line}: {name}"
        for line, name in imported(source, module)
        if name.partition(".")[0] not in known
    ]


def file_imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    module = module_of(path)
    found = set()
    for node in ast.walk(tree_of(path)):
        for name in names_imported(node, module, path.name == "__init__.py"):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                found.add(target)
    return found


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules of which each reaches each other by imports."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for target in imports[left.pop()] - seen:
                seen.add(target)
                left.append(target)
        return seen

    reach = {module: reached(module) for module in imports}
    groups = {
        tuple(sorted(other for other in reach[module] if module in reach[other]))
        for module in imports
        if module in reach[module]
    }
    return sorted(map(list, groups))


def test_files_import_in_no_circle() -> None:
    modules = {module_of(path): path for path in LIBRARY_FILES}
    assert circles({m: file_imports(path, modules) for m, path in modules.items()}) == []


def test_circles_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


def test_every_file_has_a_layer() -> None:
    rows = {None, "posttrain_kernels", *LAYERS}
    assert faults(lambda path: unit_of(module_of(path)) not in rows, LIBRARY_FILES) == {}


@pytest.mark.parametrize("check", [upward_imports, misplaced_imports])
def test_imports_go_down_and_dependencies_stay_in_their_place(check: Any) -> None:
    def found(path: Path) -> list[str]:
        return check(text_of(path), module_of(path), path.name == "__init__.py")

    assert faults(found, LIBRARY_FILES) == {}


@pytest.mark.parametrize("name", ["flow", "errors", "dist"])
def test_ground_stands_on_torch_alone(name: str) -> None:
    source = (LIBRARY["posttrain_dist"] / f"{name}.py").read_text()
    assert foreign_to_ground(source, f"posttrain_dist.{name}") == []


def test_one_sink_imports_wandb() -> None:
    users = [
        module_of(path)
        for path in LIBRARY_FILES
        if any(re.match(r"wandb\b", n) for _, n in imported(text_of(path), module_of(path)))
    ]
    assert len(users) <= 1, users


# --------------------------------------------------------------------------- the checks see


@pytest.mark.parametrize(
    ("module", "line", "seen"),
    [
        ("data.pack", "import posttrain_dist.models.load", True),
        ("data.pack", "from posttrain_dist import models", True),
        ("data.pack", "from ..models import load", True),
        ("data.pack", "def f():\n    from posttrain_dist.config import RunConfig", True),
        ("data.pack", "importlib.import_module('posttrain_dist.engine')", True),
        ("data.pack", "if TYPE_CHECKING:\n    import posttrain_dist.models", False),
        ("data.pack", "if TYPE_CHECKING:\n    x\nelse:\n    import posttrain_dist.loop", True),
        ("data.pack", "from posttrain_dist.flow import Batch", False),
        ("data.pack", "from . import mixing", False),
        ("data.pack", "from posttrain_dist import __version__", False),
        ("config", "from posttrain_dist.engine import AdamW", False),
        ("config", "from posttrain_dist.loop import fit", True),
        ("build", "import posttrain_dist.config, posttrain_kernels", False),
        ("train", "from posttrain_launch import cli", True),
        ("report", "from posttrain_dist.train import train", True),
        ("models.policy", "import posttrain_kernels", True),
        ("tuning.quantize", "import bitsandbytes", False),
        ("objectives.sft", "from posttrain_kernels import HeadLoss", False),
        ("objectives.sft", "import triton", True),
        ("loop", "import ray.train", True),
        ("loop", "from deepspeed.ops import adam", True),
        ("engine.zero", "import deepspeed", False),
        ("engine_room", "import deepspeed", True),
    ],
)
def test_import_checks_see(module: str, line: str, seen: bool) -> None:
    module = f"posttrain_dist.{module}"
    found = upward_imports(line, module) + misplaced_imports(line, module)
    assert bool(found) is seen, found


def test_import_checks_see_the_other_packages() -> None:
    assert misplaced_imports("import ray, hydra", "posttrain_launch.cli") == []
    assert misplaced_imports("import wandb", "posttrain_launch.cli") != []
    assert upward_imports("from posttrain_dist.train import train", "posttrain_launch.cli") == []
    assert (
        upward_imports("from posttrain_dist.flow import Batch", "posttrain_kernels.losses.head")
        != []
    )


def test_relative_imports_of_a_package_resolve() -> None:
    inside = list(imported("from .load import x", "posttrain_dist.models", is_package=True))
    assert inside == [(1, "posttrain_dist.models.load.x")]


def test_what_is_foreign_to_the_ground_is_seen() -> None:
    found = foreign_to_ground("import os, torch.nn\nimport numpy", "posttrain_dist.flow")
    assert found == ["line 2: numpy"]


def test_no_process_of_ours_imports_from_the_users_folder() -> None:
    """`-m` and `-c` put the current folder first: a user's ray.py would be taken for Ray."""
    calls = [
        (name_of(path), call)
        for path in LIBRARY_FILES
        for call in re.findall(r"\[\s*sys\.executable,[^\]]*", text_of(path))
    ]
    assert len(calls) >= 7
    for name, call in calls:
        assert '"-P",' in call or "*module" in call, name
