"""How the fields of a result row are written in a table of tables.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

NONE = "-"  # where a row does not say
Row = Mapping[str, Any]
Cell = Callable[[Row], str]


def text(key: str) -> Cell:
    """A field as it is."""
    return lambda row: str(row.get(key, NONE))


def texts(**keys: str) -> dict[str, Cell]:
    """Columns of fields as they are, by their headings."""
    return {heading: text(key) for heading, key in keys.items()}


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
