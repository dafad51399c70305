"""The rules of the code's shape: who imports whom, sizes, names, docstrings.

Imports are read from the source, also those inside functions; only those under
`if TYPE_CHECKING:` are exempt, because they never run.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Package -> folder.
LIBRARY = {
    "posttrain_dist": ROOT / "posttrain_dist",
    "posttrain_kernels": ROOT / "kernels/posttrain_kernels",
    "posttrain_launch": ROOT / "launch/posttrain_launch",
}
# Only size and names are checked outside the packages.
FOLDERS = [
    *LIBRARY.values(),
    ROOT / "conf",
    ROOT / "slurm",
    ROOT / "tests",
    ROOT / "benchmarks",
    ROOT / "tools",
]

LAYERS = {
    "posttrain_launch": 7,
    "run": 6,
    **dict.fromkeys(
        (
            "train",
            "hooks",
            "rollouts",
            "prepare",
            "inspection",
            "evaluation",
            "synthesis",
            "export",
            "report",
            "assets",
        ),
        5,
    ),
    **dict.fromkeys(("build", "preflight", "planner"), 4),
    **dict.fromkeys(("loop", "config"), 3),
    **dict.fromkeys(
        ("tuning", "objectives", "engine", "checkpoint", "metrics", "diagnosis", "generation"), 2
    ),
    **dict.fromkeys(("data", "models"), 1),
    **dict.fromkeys(("flow", "errors", "dist", "files", "logs"), 0),
}
KERNEL_USERS = {"objectives", "build", "posttrain_launch"}
# Dependency -> modules, with all below them, that may import it.
CONFINED = {
    "ray": ("posttrain_launch",),
    "hydra": ("posttrain_launch",),
    "deepspeed": ("posttrain_dist.engine",),
    "bitsandbytes": ("posttrain_dist.engine", "posttrain_dist.tuning"),
    "wandb": ("posttrain_dist.metrics",),
    "triton": ("posttrain_kernels",),
}
FORBIDDEN_WORDS = {"common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}
FORBIDDEN_STEMS = {"base_trainer", "basetrainer"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_files(*folders: Path) -> list[Path]:
    found = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return [path for path in found if path.suffix in {".py", ".sh", ".sbatch"}]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


LIBRARY_FILES = [path for path in source_files(*LIBRARY.values()) if path.suffix == ".py"]
ALL_FILES = source_files(*FOLDERS)
each_library_file = pytest.mark.parametrize("path", LIBRARY_FILES, ids=name_of)
each_file = pytest.mark.parametrize("path", ALL_FILES, ids=name_of)


def module_of(path: Path) -> str:
    """The dotted name of a library file."""
    package, folder = next((p, f) for p, f in LIBRARY.items() if path.is_relative_to(f))
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


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


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import; of `from a import b` the name is `a.b`."""
    for node in running_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                parents = module.split(".")
                cut = len(parents) - node.level + is_package
                base = parents[:cut] + base
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            name = node.args[0]
            if called.endswith(("import_module", "__import__")) and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


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


@each_library_file
def test_imports_go_down(path: Path) -> None:
    module = module_of(path)
    unit = unit_of(module)
    assert unit in {None, "posttrain_kernels", *LAYERS}, "no row in the table of layers"
    source, is_package = path.read_text(), path.name == "__init__.py"
    assert upward_imports(source, module, is_package) == []


@each_library_file
def test_dependencies_stay_in_their_place(path: Path) -> None:
    is_package = path.name == "__init__.py"
    assert misplaced_imports(path.read_text(), module_of(path), is_package) == []


@pytest.mark.parametrize("name", ["flow", "errors", "dist"])
def test_ground_stands_on_torch_alone(name: str) -> None:
    source = (LIBRARY["posttrain_dist"] / f"{name}.py").read_text()
    assert foreign_to_ground(source, f"posttrain_dist.{name}") == []


def test_one_sink_imports_wandb() -> None:
    users = [
        module_of(path)
        for path in LIBRARY_FILES
        if any(re.match(r"wandb\b", n) for _, n in imported(path.read_text(), module_of(path)))
    ]
    assert len(users) <= 1, users


# --------------------------------------------------------------------------- size and names


def code_lines(function: Function, lines: list[str]) -> int:
    """Lines of a function without its docstring, comments and blank lines."""
    first = function.body[0]
    skipped = set()
    if ast.get_docstring(function, clean=False) is not None:
        skipped = set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    own = range(function.lineno, (function.end_lineno or function.lineno) + 1)
    texts = (lines[number - 1].strip() for number in own if number not in skipped)
    return sum(1 for text in texts if text and not text.startswith("#"))


def long_functions(source: str) -> list[str]:
    lines = source.splitlines()
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))
    sizes = ((f"line {f.lineno}: {f.name}", code_lines(f, lines)) for f in functions)
    return [f"{where} has {size} lines" for where, size in sizes if size > MAX_FUNCTION_LINES]


def forbidden_parts(path: Path) -> list[str]:
    """Parts of a path that say nothing about their subject."""
    stems = [part.partition(".")[0].lower() for part in path.parts]
    return [s for s in stems if s in FORBIDDEN_STEMS or FORBIDDEN_WORDS & set(s.split("_"))]


@each_file
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", [p for p in ALL_FILES if p.suffix == ".py"], ids=name_of)
def test_functions_fit_a_screen(path: Path) -> None:
    assert long_functions(path.read_text()) == []


@each_file
def test_name_says_the_subject(path: Path) -> None:
    assert forbidden_parts(path.relative_to(ROOT)) == []


# --------------------------------------------------------------------------- docstrings


def protocol_methods() -> set[str]:
    """Methods that a Protocol of ours documents once, for all that implement it."""
    classes = [
        node
        for path in source_files(*LIBRARY.values())
        if path.suffix == ".py"
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
    ]
    return {
        item.name
        for node in classes
        for item in node.body
        if isinstance(item, Function) and ast.get_docstring(item)
    }


PROTOCOL_METHODS = protocol_methods()


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Public functions, classes and methods without a docstring, as `line N: name`."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            branches = [node.body, node.orelse, *(h.body for h in getattr(node, "handlers", []))]
            for branch in branches:
                yield from undocumented(branch, prefix)
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
        said = decorators & {"overload", "setter"} or (prefix and node.name in PROTOCOL_METHODS)
        if ast.get_docstring(node) is None and not said:
            yield f"line {node.lineno}: {prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{prefix}{node.name}.")


@each_library_file
def test_public_names_have_a_docstring(path: Path) -> None:
    assert list(undocumented(ast.parse(path.read_text()).body)) == []


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


def test_size_and_name_checks_see() -> None:
    body = "    x = 1\n" * 59
    assert long_functions(f'def f():\n    """One\n\n    two."""\n\n    # why\n{body}') == []
    assert long_functions(f"class A:\n  def f():\n{body}    x = 1\n") == ["line 2: f has 61 lines"]
    assert forbidden_parts(Path("posttrain_dist/data/text_utils.py")) == ["text_utils"]
    assert forbidden_parts(Path("helpers/pack.py")) == ["helpers"]
    assert forbidden_parts(Path("posttrain_dist/commonplace.py")) == []
    assert foreign_to_ground("import os, torch.nn\nimport numpy", "posttrain_dist.flow") == [
        "line 2: numpy"
    ]


def test_docstring_check_sees() -> None:
    source = """
def f(): "Said."
def g(): pass
def _h(): pass
class A:
    "Said."
    def m(self): pass
    def __len__(self): pass
    @m.setter
    def m(self, value): pass
"""
    assert list(undocumented(ast.parse(source).body)) == ["line 3: g", "line 7: A.m"]
