"""JSON of any shape as blocks of a page: pairs and tables."""

from __future__ import annotations

from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.numbers import UNKNOWN


def blocks(values: Any) -> list[dict[str, Any]]:
    """Nested JSON as blocks for the page: scalars as pairs, like objects as one table."""
    found: list[dict[str, Any]] = []
    _add_blocks(found, "", values)
    return found


def data_blocks(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The prepared data: a table of counts per channel for each split, without histograms."""
    splits = summary.get("splits")
    if not isinstance(splits, dict):
        return blocks({key: value for key, value in summary.items() if key != "inputs"})
    named: dict[str, Any] = {
        name: {
            channel: {key: value for key, value in counts.items() if not isinstance(value, list)}
            for channel, counts in (splits.get(split) or {}).items()
        }
        for name, split in (("training", "train"), ("held-out", "eval"))
    }
    if moved := summary.get("duplicates_moved"):
        named["held-out rows left to training"] = moved
    return blocks({key: value for key, value in named.items() if value})


def _add_blocks(found: list[dict[str, Any]], title: str, values: Any) -> None:
    if not isinstance(values, dict) or not values:
        return
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if flat:
        pairs = [(_label(key), _cell(value)) for key, value in flat.items()]
        found.append({"title": title, "head": [], "rows": pairs})
    nested = {key: value for key, value in values.items() if isinstance(value, dict)}
    heads = [tuple(value) for value in nested.values()]
    cells = [cell for value in nested.values() for cell in value.values()]
    scalar = not any(isinstance(cell, dict | list) for cell in cells)
    if len(nested) > 1 and heads[0] and len(set(heads)) == 1 and scalar:
        rows = [[key, *map(_cell, value.values())] for key, value in nested.items()]
        head = ["", *map(_label, heads[0])]
        found.append({"title": "" if flat else title, "head": head, "rows": rows})
        return
    for key, value in nested.items():
        _add_blocks(found, f"{title} / {_label(key)}" if title else _label(key), value)


def _label(key: Any) -> str:
    return str(key).replace("_", " ")


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: UNKNOWN}[value]
    if isinstance(value, int):
        return numbers.whole(value)
    if isinstance(value, float):
        return numbers.general(value)
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or UNKNOWN
    return str(value)
