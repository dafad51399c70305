"""The table of the slowest tests, from pytest's JUnit file into a section of tests/SLOWEST.md.

    python -m pytest -n 3 --junitxml=junit.xml
    python tools/slowest_tests.py junit.xml after "2026-11-28, 2 idle cores, make test"

A section of that name is replaced, others stay.
"""

from __future__ import annotations

import argparse
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "tests" / "SLOWEST.md"
GROUPS = re.compile(r"@[^\]]*$")  # pytest-xdist ends a test's name with @ and its group


def table(junit: Path, count: int = 40) -> str:
    """Seconds of each test with the fixtures that it was the first to ask for, as Markdown."""
    cases = [
        (float(case.get("time", 0)), case.get("classname", ""), case.get("name", ""))
        for case in ElementTree.parse(junit).iter("testcase")
    ]
    total = sum(seconds for seconds, _, _ in cases)
    lines = [f"{len(cases)} tests, {total:.0f} s in all:", "", "| s | test |", "|--:|---|"]
    for seconds, module, name in sorted(cases, reverse=True)[:count]:
        where = module.replace(".", "/") + ".py::" + GROUPS.sub("", name)
        lines.append(f"| {seconds:.1f} | `{where}` |")
    return "\n".join(lines)


def write(page: Path, section: str, how: str, table: str) -> None:
    """Put the table below `## section`, with what was run where and when."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    new = f"## {section}\n\n{how}\n\n{table}\n"
    old = re.compile(rf"^## {re.escape(section)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(text):
        text = old.sub(lambda match: new + ("\n" if match.end() < len(text) else ""), text)
    else:
        text = f"{text.rstrip()}\n\n{new}".lstrip()
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("junit", type=Path)
    parser.add_argument("section", help="before, after")
    parser.add_argument("how", help="date, machine, command, wall and CPU time")
    args = parser.parse_args()
    write(PAGE, args.section, args.how, table(args.junit))


if __name__ == "__main__":
    main()
