"""The tables of docs/performance.md, made from the rows under benchmarks/results/.

    python benchmarks/tables.py            # rewrites the page; --check only compares

A table stands between two comments, `<!-- table: name -->` and `<!-- /table -->`, and shows rows of
one run: the last one that has what the table asks for, because only arms of one run compare. Under
it stand machine, versions, load, date and command. What tables there are: table_specs.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKS = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

NONE = "-"  # where a row does not say

Row = Mapping[str, Any]
Cell = Callable[[Row], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What stands between two marks: some rows of a results file, one line each."""

    source: str  # results/<source>.jsonl
    columns: Mapping[str, Cell]  # heading -> the text of a row
    where: Mapping[str, Any] = field(default_factory=dict)  # what a row must say
    per: Sequence[str] = ()  # rows that differ in these compare only among themselves

    def rows(self, results: Path) -> list[Row]:
        """The rows of the last run that has any; of each group of `per`, if given."""
        found = [row for row in read(results / f"{self.source}.jsonl") if holds(row, self.where)]
        last = {self._group(row): run_of(row) for row in found}
        kept = [row for row in found if run_of(row) == last[self._group(row)]]
        return sorted(kept, key=lambda row: list(last).index(self._group(row)))

    def _group(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in self.per)

    def text(self, results: Path) -> str:
        """The table in Markdown, what was left out and why, and where it was measured."""
        rows = self.rows(results)
        if not rows:
            return "Not measured yet.\n"
        shown = [row for row in rows if reason(row) is None]
        lines = table_lines(
            list(self.columns), [[cell(r) for cell in self.columns.values()] for r in shown]
        )
        left_out = dict.fromkeys(f"{r['arm']}: {reason(r)}" for r in rows if reason(r) is not None)
        if left_out:
            lines += ["", f"Not run: {'; '.join(left_out)}."]
        for last in {run_of(row): row for row in rows}.values():
            lines += ["", origin(last)]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A figure that was aimed at, and the row that holds what was reached."""

    said: str
    limit: float
    most: bool  # whether the limit is the most allowed; else the least
    source: str
    where: Mapping[str, Any]
    value: Callable[[Row], float | None]
    digits: int = 2

    def cells(self, results: Path) -> list[str]:
        """What was aimed at, what was measured, whether that is enough."""
        sense = "at most" if self.most else "at least"
        aimed = f"{sense} {self.limit:,g}" if self.limit >= 1 else f"{sense} {self.limit:.3g}"
        rows = Table(source=self.source, columns={}, where=self.where).rows(results)
        value = self.value(rows[-1]) if rows else None
        if value is None:
            return [self.said, aimed, "not measured", ""]
        met = value <= self.limit if self.most else value >= self.limit
        return [self.said, aimed, f"{value:,.{self.digits}f}", "yes" if met else "**no**"]


@dataclass(frozen=True, slots=True)
class Goals:
    """A table of goals."""

    goals: Sequence[Goal]

    def text(self, results: Path) -> str:
        """The table in Markdown."""
        cells = [goal.cells(results) for goal in self.goals]
        return "\n".join(table_lines(["", "goal", "measured", "met"], cells)) + "\n"


# ------------------------------------------------------------------------------ cells


def text(key: str) -> Cell:
    """A field as it is."""
    return lambda row: str(row.get(key, NONE))


def number(key: str, digits: int = 2, scale: float = 1.0, unit: str = "") -> Cell:
    """A number times `scale`, or a dash where the row has none."""

    def cell(row: Row) -> str:
        value = row.get(key)
        return NONE if value is None else f"{value * scale:,.{digits}f}{unit}"

    return cell


def span(low: str, high: str, digits: int = 2, scale: float = 1.0) -> Cell:
    """Two numbers: `low to high`."""
    a, b = number(low, digits, scale), number(high, digits, scale)
    return lambda row: NONE if row.get(low) is None else f"{a(row)} to {b(row)}"


def error(*keys: str) -> Cell:
    """The largest of some relative errors."""

    def cell(row: Row) -> str:
        found = [row[key] for key in keys if row.get(key) is not None]
        return f"{max(found):.0e}" if found else NONE

    return cell


# ---------------------------------------------------------------------------- making


def read(path: Path) -> list[Row]:
    """All rows of a results file; none if there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def holds(row: Row, where: Mapping[str, Any]) -> bool:
    """Whether a row says all of `where`; a tuple there means: one of these."""
    return all(
        row.get(key) in value if isinstance(value, tuple) else row.get(key) == value
        for key, value in where.items()
    )


def run_of(row: Row) -> str:
    """Rows of one process share this."""
    return str(row.get("run", row["date"]))


def reason(row: Row) -> str | None:
    """Why an arm has no figures, or None."""
    found = row.get("skipped", row.get("failed"))
    return None if found is None else str(found)


def table_lines(headings: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """Markdown lines; all columns but the first are aligned right."""
    rule = ["---", *("---:" for _ in headings[1:])]
    return [f"| {' | '.join(line)} |" for line in (headings, rule, *cells)]


def origin(row: Row) -> str:
    """Machine, versions, date and command of a row."""
    versions = ", ".join(f"{n} {v}" for n, v in row["versions"].items() if v != "-")
    load = f"; load {row['load_1min']}" if "load_1min" in row else ""
    return f"{row['machine']}; {versions}{load}; {row['date'][:16]}Z; `{row['command']}`"


def fill(page: str, tables: Mapping[str, Table | Goals], results: Path = RESULTS) -> str:
    """The page with every marked table made anew.

    Raises:
        KeyError: a mark names no table.
    """

    def make(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]].text(results)}\n{match[3]}"

    return MARKS.sub(make, page)


def main() -> None:
    from table_specs import TABLES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, change nothing")
    page = PAGE.read_text()
    made = fill(page, TABLES)
    if parser.parse_args().check:
        raise SystemExit(0 if made == page else f"{PAGE} is not what the rows give")
    PAGE.write_text(made)


if __name__ == "__main__":
    main()
