"""Calibration of a reward model: how often it is right, by how sure it is, as plain SVG places."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.page import MAX_CHANNEL_CHARTS

# Of a panel, in SVG units: the plot's corners.
LEFT, TOP, RIGHT, BOTTOM = 42.0, 10.0, 242.0, 148.0
_SMALLEST, _LARGEST = 2.5, 9.0  # radius of a dot


@dataclass(frozen=True, slots=True)
class Dot:
    """The comparisons of one bin; its area grows with their number."""

    x: float
    y: float
    radius: float
    title: str


@dataclass(frozen=True, slots=True)
class Panel:
    """All channels, or one."""

    title: str
    note: str
    label: str  # for a screen reader
    dots: list[Dot]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The panels, and where their grid lies."""

    step: int
    panels: list[Panel]
    columns: list[tuple[float, str]]  # place and label of predicted probabilities
    rows: list[tuple[float, str]]  # ... and of observed shares
    diagonal: tuple[float, float, float, float]


def calibration_of(folder: Path) -> Calibration | None:
    """From figures.json of a run folder; None: there is none, or it is damaged."""
    try:
        values = json.loads((folder / "figures.json").read_bytes())
        step, channels = int(values["step"]), dict(values["calibration"])
        panels = [_panel(name, bins) for name, bins in channels.items()]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    drawn = [panel for panel in panels if panel.dots]
    if len(drawn) == 2:  # one channel, and the same again
        drawn = drawn[:1]
    if not drawn:
        return None
    shares = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    return Calibration(
        step=step,
        panels=drawn[: 1 + MAX_CHANNEL_CHARTS],
        columns=[(_x(share), f"{share:.0%}") for share in shares],
        rows=[(_y(share), f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
        diagonal=(_x(0.5), _y(0.5), _x(1.0), _y(1.0)),
    )


def _panel(name: str, bins: list[dict[str, Any]]) -> Panel:
    kept = [each for each in bins if each["count"] > 0]
    total = sum(each["count"] for each in kept)
    right = sum(each["right"] * each["count"] for each in kept)
    apart = sum(abs(each["right"] - each["confidence"]) * each["count"] for each in kept)
    title = name or "All channels"
    note = f"error {apart / total:.1%}, right {right / total:.1%}" if total else ""
    most = max((each["count"] for each in kept), default=1.0)
    dots = [
        Dot(
            round(_x(each["confidence"]), 2),
            round(_y(each["right"]), 2),
            round(max(_SMALLEST, _LARGEST * math.sqrt(each["count"] / most)), 2),
            f"predicted {each['confidence']:.1%}, right {each['right']:.1%} of "
            f"{numbers.count(each['count'])}",
        )
        for each in kept
    ]
    label = f"{title}: {'; '.join(dot.title for dot in dots)}"
    return Panel(title, note, label, dots)


def _x(probability: float) -> float:
    return LEFT + (probability - 0.5) / 0.5 * (RIGHT - LEFT)


def _y(share: float) -> float:
    return BOTTOM - share * (BOTTOM - TOP)
