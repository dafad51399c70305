"""Two keys against each other: in each cell the best trial that has both values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.sweep.axes import Axis, axes_of, ordered_places, values_of

PREFERRED = ("tuning.rank", "optimizer.lr")


@dataclass(frozen=True, slots=True)
class Cell:
    """The best trial at one place."""

    text: str  # its metric; "" where no trial has one
    goodness: float  # 1 the best of all cells, 0 the worst
    title: str  # every trial of the cell
    is_best: bool = False


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Rows of cells; the first axis goes down, the second to the right."""

    down: Axis
    right: Axis
    rows: list[tuple[str, list[Cell]]]
    others: tuple[str, ...]  # keys that vary beside the two


def heat_map(data: Mapping[str, Any]) -> HeatMap | None:
    """The map of the two keys that vary most; None where fewer than two vary.

    Rank and learning rate come first where both vary.
    """
    axes = axes_of(data)
    if len(axes) < 2:
        return None
    by_key = {axis.key: axis for axis in axes}
    if set(PREFERRED) <= set(by_key):
        down, right = (by_key[key] for key in PREFERRED)
    else:
        right, down = sorted(axes, key=lambda axis: -len(axis.places))[:2]
    values = values_of(data)
    best_of: dict[tuple[int, int], int] = {}
    inside: dict[tuple[int, int], list[str]] = {}
    sign = -1 if data["direction"] == "maximize" else 1
    for trial in data["trials"]:
        texts = trial["varied"]
        if down.key not in texts or right.key not in texts:
            continue
        place = down.places[str(texts[down.key])], right.places[str(texts[right.key])]
        number = trial["number"]
        shown = numbers.loss(values[number]) if number in values else trial["state"]
        inside.setdefault(place, []).append(f"trial {number}: {shown}")
        if number not in values:
            continue
        if place not in best_of or sign * values[number] < sign * values[best_of[place]]:
            best_of[place] = number
    goodness = ordered_places({n: values[n] for n in best_of.values()}, data["direction"])

    def cell(place: tuple[int, int]) -> Cell:
        number, title = best_of.get(place), "\n".join(inside.get(place, []))
        if number is None:
            return Cell("", 0.0, title)
        text = numbers.loss(values[number])
        return Cell(text, goodness[number], title, is_best=number == data["best"])

    rows = [
        (label, [cell((i, j)) for j in range(len(right.labels))])
        for i, label in enumerate(down.labels)
    ]
    others = tuple(axis.key for axis in axes if axis not in (down, right))
    return HeatMap(down, right, rows, others)
