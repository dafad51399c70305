"""Text is UTF-8 whatever the locale: no call leaves the encoding of a file or a pipe to it."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
from source_tree import LIBRARY_FILES, faults, text_of

from posttrain_dist.data.formats.records import find_files
from posttrain_dist.errors import PosttrainError

ROOT = Path(__file__).parent.parent
TOOLS = [
    path for folder in ("tools", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))
]
NO_TEXT_FILES = {"os.open", "safe_open", "Examples.open", "self._view.open"}
# Called name -> position of the mode and of the encoding among the positional arguments.
OPENERS = {
    "open": (1, 3),  # the built-in; a method, Path.open, has no file before them
    "fdopen": (1, 3),
    "NamedTemporaryFile": (0, 2),
    "TemporaryFile": (0, 2),
}
TEXT = {"read_text": 0, "write_text": 1, "TextIOWrapper": 1, "FileHandler": 2}


def locale_calls(source: str) -> list[str]:
    """Calls in `source` that read or write text in the encoding of the locale."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"line {c.lineno}: {ast.unparse(c)[:80]}" for c in calls if asks_the_locale(c)]


def asks_the_locale(call: ast.Call) -> bool:
    function = ast.unparse(call.func)
    name = function.rpartition(".")[2]
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given or function in NO_TEXT_FILES:
        return False
    if any(is_true(given.get(key)) for key in ("text", "universal_newlines")):
        return function.startswith("subprocess.") or name == "Popen"
    if name in TEXT:
        return len(call.args) <= TEXT[name]
    if name not in OPENERS:
        return False
    mode_at, encoding_at = OPENERS[name]
    if name == "open" and "." in function and function not in ("io.open", "gzip.open"):
        mode_at, encoding_at = mode_at - 1, encoding_at - 1
    if len(call.args) > encoding_at:
        return False
    mode = given.get("mode") or (call.args[mode_at] if len(call.args) > mode_at else None)
    if name in ("NamedTemporaryFile", "TemporaryFile") and mode is None:
        return False  # binary, unless said otherwise
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def test_no_text_is_in_the_encoding_of_the_locale() -> None:
    assert faults(lambda path: locale_calls(text_of(path)), [*LIBRARY_FILES, *TOOLS]) == {}


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"gr\xf6sse.jsonl")).write_text('{"text": "x"}\n')
    with pytest.raises(PosttrainError, match=r"gr\ufffdsse\.jsonl: holds bytes that are no UTF-8"):
        find_files(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("open('a')", True),
        ("open('a', 'wb')", False),
        ("open('a', 'w', 1, 'utf-8')", False),
        ("path.open()", True),
        ("gzip.open(path, 'rb')", False),
        ("path.open('ab')", False),
        ("path.open(mode)", True),
        ("path.open('w', encoding='utf-8')", False),
        ("(a / 'b').read_text()", True),
        ("path.write_text(text)", True),
        ("path.write_text(text, 'utf-8')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("os.fdopen(1, 'w')", True),
        ("tempfile.TemporaryFile(dir=folder)", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("subprocess.run(['git'], text=True)", True),
        ("subprocess.run(['git'], text=True, encoding='utf-8')", False),
        ("subprocess.run(['git'], capture_output=True)", False),
        ("logging.FileHandler(path)", True),
        ("io.TextIOWrapper(stream)", True),
    ],
)
def test_calls_without_an_encoding_are_seen(line: str, seen: bool) -> None:
    assert bool(locale_calls(line)) is seen
