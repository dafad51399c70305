"""Real text from the standard library of the Python that runs this: functions, classes, prose."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests, third-party code and folders under another licence's notice are left out.
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo"}


@dataclass(frozen=True, slots=True)
class Documented:
    """A function or class with its docstring taken out."""

    kind: str  # "function" or "class"
    code: str  # without docstring, decorators and comments; a class: its head and method names
    summary: str  # first paragraph of the docstring, on one line; "" where there is none
    source: str  # as it stands in the file, dedented; for a class its code and whole docstring


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Source and syntax tree of every module, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            yield source, ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue


def documented(source: str, tree: ast.Module) -> Iterator[Documented]:
    """Every function and class of one module; those without docstring have summary ""."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found = _function(source, node) if isinstance(node, ast.FunctionDef) else _class(node)
            if found is not None:
                yield found


def paragraphs(tree: ast.Module) -> Iterator[str]:
    """Module docstring of one module, if it has one."""
    text = ast.get_docstring(tree)
    if text:
        yield text


def _function(source: str, node: ast.FunctionDef) -> Documented | None:
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    summary = _summary(node)
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        return None
    bare = ast.FunctionDef(**{name: getattr(node, name) for name in node._fields})
    bare.body, bare.decorator_list = body, []
    code = ast.unparse(ast.fix_missing_locations(ast.copy_location(bare, node)))
    return Documented("function", code, summary, textwrap.dedent("\n".join(lines)))


def _class(node: ast.ClassDef) -> Documented:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
    public = [name for name in methods if not name.startswith("_")][:6]
    head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    code = "\n".join([head, *(f"    def {name}" for name in public)])
    text = ast.get_docstring(node) or ""
    return Documented("class", code, _summary(node), f'{head}\n    """{text}"""\n')


def _summary(node: ast.FunctionDef | ast.ClassDef) -> str:
    text = ast.get_docstring(node) or ""
    return " ".join(text.split("\n\n")[0].split())
