"""Each trial as a line through an axis for every key that varies and one for the metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.sweep.axes import Axis, axes_of, ordered_places, short_key, values_of

MOST_AXES = 7
MOST_MARKS = 9  # labels beside one axis


@dataclass(frozen=True, slots=True)
class Mark:
    """A label beside an axis; `top` in per cent of its height."""

    text: str
    top: float


@dataclass(frozen=True, slots=True)
class Column:
    """One axis; `left` in per cent of the width."""

    name: str
    left: float
    marks: list[Mark]


@dataclass(frozen=True, slots=True)
class Line:
    """One trial; `points` for an SVG of 100 x 100."""

    title: str
    points: str
    goodness: float
    is_best: bool


@dataclass(frozen=True, slots=True)
class Parallel:
    """The whole view; the best lines come last, so that they lie above the others."""

    columns: list[Column]
    lines: list[Line]


def parallel(data: Mapping[str, Any]) -> Parallel | None:
    """The view; None with fewer than two keys or three trials that have a value."""
    axes = axes_of(data)[: MOST_AXES - 1]
    values = values_of(data)
    if len(axes) < 2 or len(values) < 3:
        return None
    goodness = ordered_places(values, data["direction"])
    low, high = min(values.values()), max(values.values())
    width = (high - low) or 1.0
    columns = []
    for i, axis in enumerate(axes):
        ends = sorted(axis.shares, key=axis.shares.__getitem__)
        shown = ends if len(ends) <= MOST_MARKS else [ends[0], ends[-1]]
        marks = [Mark(_name(axis, text), round(100 * (1 - axis.shares[text]), 2)) for text in shown]
        columns.append(Column(short_key(axis.key, data["keys"]), _left(i, len(axes)), marks))
    ends_of_metric = [Mark(numbers.loss(high), 0.0), Mark(numbers.loss(low), 100.0)]
    columns.append(Column(data["metric"].rpartition("/")[2], 100.0, ends_of_metric))
    lines = []
    for trial in data["trials"]:
        number, texts = trial["number"], trial["varied"]
        if number not in values or any(axis.key not in texts for axis in axes):
            continue
        shares = [axis.shares[str(texts[axis.key])] for axis in axes]
        shares.append((values[number] - low) / width)
        points = " ".join(
            f"{_left(i, len(axes)):g},{100 * (1 - share):.4g}" for i, share in enumerate(shares)
        )
        is_best = number == data["best"]
        title = f"trial {number}: {numbers.loss(values[number])}"
        lines.append(Line(title, points, goodness[number], is_best))
    lines.sort(key=lambda line: (line.is_best, line.goodness))
    return Parallel(columns, lines)


def _name(axis: Axis, text: str) -> str:
    """The label of a value; its own text where labels are those of bins."""
    return axis.labels[axis.places[text]] if len(axis.labels) == len(axis.places) else text


def _left(index: int, last: int) -> float:
    return round(100 * index / last, 2)
