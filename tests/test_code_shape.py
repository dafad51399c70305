"""The shape of the code: sizes, names, docstrings."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from source_tree import ALL_FILES, LIBRARY, LIBRARY_FILES, ROOT, faults, text_of, tree_of

FORBIDDEN_WORDS = {"common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}
FORBIDDEN_STEMS = {"base_trainer", "basetrainer"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_LOOP_LINES = 150
MAX_FOLDER_FILES = 12  # beside __init__.py


Function = ast.FunctionDef | ast.AsyncFunctionDef


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


def long_functions(source: str, tree: ast.Module | None = None) -> list[str]:
    lines = source.splitlines()
    nodes = ast.walk(tree or ast.parse(source))
    functions = (node for node in nodes if isinstance(node, Function))
    sizes = ((f"line {f.lineno}: {f.name}", code_lines(f, lines)) for f in functions)
    return [f"{where} has {size} lines" for where, size in sizes if size > MAX_FUNCTION_LINES]


def forbidden_parts(path: Path) -> list[str]:
    """Parts of a path that say nothing about their subject."""
    stems = [part.partition(".")[0].lower() for part in path.parts]
    return [s for s in stems if s in FORBIDDEN_STEMS or FORBIDDEN_WORDS & set(s.split("_"))]


def test_files_are_short() -> None:
    def lines(path: Path) -> int:
        number = len(text_of(path).splitlines())
        return number if number > MAX_FILE_LINES else 0

    assert faults(lines, ALL_FILES) == {}


def test_functions_fit_a_screen() -> None:
    python = [path for path in ALL_FILES if path.suffix == ".py"]
    assert faults(lambda path: long_functions(text_of(path), tree_of(path)), python) == {}


def test_the_loop_stays_short() -> None:
    text = (LIBRARY["posttrain_dist"] / "loop.py").read_text()
    assert len(text.splitlines()) <= MAX_LOOP_LINES


def crowded(paths: Iterable[Path]) -> list[str]:
    """Folders with more Python files than one look takes in, `__init__.py` left out."""
    counts = Counter(path.parent for path in paths if path.name != "__init__.py")
    return [f"{folder}: {count}" for folder, count in counts.items() if count > MAX_FOLDER_FILES]


def repeated_names(paths: Iterable[Path], root: Path) -> list[str]:
    """File names that a package has twice; verbs may repeat what they are about."""
    names = Counter(
        path.name
        for path in paths
        if path.name not in {"__init__.py", "base.py"}
        and "commands" not in path.relative_to(root).parts
    )
    return [name for name, count in names.items() if count > 1]


def test_no_folder_is_crowded() -> None:
    assert crowded(LIBRARY_FILES) == []


@pytest.mark.parametrize("package", LIBRARY)
def test_no_file_name_stands_twice_in_a_package(package: str) -> None:
    root = LIBRARY[package]
    assert repeated_names(root.rglob("*.py"), root) == []


def test_crowds_and_repetitions_are_seen() -> None:
    folder = Path("p/data")
    files = [folder / f"f{i}.py" for i in range(13)]
    assert crowded([*files[:12], folder / "__init__.py"]) == []
    assert crowded(files) == ["p/data: 13"]
    twice = [Path("p/a/read.py"), Path("p/b/read.py"), Path("p/a/base.py"), Path("p/b/base.py")]
    assert repeated_names([*twice, Path("p/commands/read.py")], Path("p")) == ["read.py"]


def test_names_say_the_subject() -> None:
    assert faults(lambda path: forbidden_parts(path.relative_to(ROOT)), ALL_FILES) == {}


# --------------------------------------------------------------------------- docstrings


@cache
def protocol_methods() -> set[str]:
    """Methods that a Protocol of ours documents once, for all that implement it."""
    classes = [
        node
        for path in LIBRARY_FILES
        for node in tree_of(path).body
        if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
    ]
    return {
        item.name
        for node in classes
        for item in node.body
        if isinstance(item, Function) and ast.get_docstring(item)
    }


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
        said = decorators & {"overload", "setter"} or (prefix and node.name in protocol_methods())
        if ast.get_docstring(node) is None and not said:
            yield f"line {node.lineno}: {prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{prefix}{node.name}.")


def test_public_names_have_a_docstring() -> None:
    assert faults(lambda path: list(undocumented(tree_of(path).body)), LIBRARY_FILES) == {}


def test_size_and_name_checks_see() -> None:
    body = "    x = 1\n" * 59
    assert long_functions(f'def f():\n    """One\n\n    two."""\n\n    # why\n{body}') == []
    assert long_functions(f"class A:\n  def f():\n{body}    x = 1\n") == ["line 2: f has 61 lines"]
    assert forbidden_parts(Path("posttrain_dist/data/text_utils.py")) == ["text_utils"]
    assert forbidden_parts(Path("helpers/pack.py")) == ["helpers"]
    assert forbidden_parts(Path("posttrain_dist/commonplace.py")) == []


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
