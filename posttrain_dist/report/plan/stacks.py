"""Memory as stacked bars: one a phase, all on the scale of what there is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.plan.plan_figures import scale_of

MAX_TICKS = 9


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar: the class of its colour, its width in per cent, and what a pointer shows."""

    kind: str
    width: float
    tip: str


@dataclass(frozen=True, slots=True)
class Stack:
    """One bar."""

    name: str
    text: str
    segments: tuple[Segment, ...]
    strong: bool = False


@dataclass(frozen=True, slots=True)
class MemoryChart:
    """All bars of a device or host. Places are per cent of the width.

    Attributes:
        limit: where the memory ends; None: far beyond the right edge.
        margin: from where on it is kept free; None: no margin.
        legend: (class of the colour, name, bytes at the peak), largest first, then what is there
            in other phases only.
        phases: heads of the table; rows: (class, item, bytes of each phase as text).
    """

    stacks: tuple[Stack, ...]
    limit: float | None
    limit_text: str
    margin: float | None
    over: bool
    ticks: tuple[tuple[float, str], ...]
    legend: tuple[tuple[str, str, str], ...]
    phases: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[str, ...]], ...]


def memory_chart(
    memory: Mapping[str, Any], capacity_bytes: int, margin_bytes: int, context: str
) -> MemoryChart:
    """The phases of a device or host beside its capacity, the whole of the peak as first bar.

    Args:
        context: what `context_bytes` is of.
    """
    phases = [phase for phase in memory["phases"] if any(phase["items"].values())]
    phases = phases or memory["phases"]
    peak = next(phase for phase in phases if phase["name"] == memory["peak_phase"])
    scale = scale_of(memory["total_bytes"], capacity_bytes)
    ordered = sorted(peak["items"], key=lambda item: -peak["items"][item])
    others = {item: None for phase in phases for item in phase["items"] if item not in ordered}
    items = [*ordered, *others]
    beyond = {"allocator slack": memory["slack_bytes"], context: memory["context_bytes"]}
    beyond = {name: size for name, size in beyond.items() if size}
    whole = [*_segments(peak["items"], items, scale), *_segments(beyond, [*beyond], scale)]
    total = f"{numbers.memory(memory['total_bytes'])} of {numbers.memory(capacity_bytes)}"
    sizes = {phase["name"]: sum(phase["items"].values()) for phase in phases}
    stacks = [
        Stack(name, numbers.memory(size), _segments(phase["items"], items, scale))
        for phase, (name, size) in zip(phases, sizes.items(), strict=True)
    ]
    return MemoryChart(
        stacks=(Stack(f"Peak: {peak['name']}", total, tuple(whole), strong=True), *stacks),
        limit=_percent(capacity_bytes, scale) if capacity_bytes <= scale else None,
        limit_text=numbers.memory(capacity_bytes),
        margin=_percent(capacity_bytes - margin_bytes, scale)
        if margin_bytes and capacity_bytes <= scale
        else None,
        over=memory["total_bytes"] > capacity_bytes - margin_bytes,
        ticks=_ticks(scale),
        legend=tuple(
            (kind_of(name), name, _cell(size) or numbers.UNKNOWN)
            for name, size in (
                {name: peak["items"].get(name, 0) for name in items} | beyond
            ).items()
        ),
        phases=tuple(sizes),
        rows=(
            *(
                (kind_of(item), item, tuple(_cell(phase["items"].get(item, 0)) for phase in phases))
                for item in items
            ),
            ("", "allocated", tuple(_cell(size) for size in sizes.values())),
        ),
    )


def kind_of(item: str) -> str:
    """The class of an item's colour in plan.css."""
    return "item-" + re.sub(r"[^a-z0-9]+", "-", item.lower()).strip("-")


def _segments(sizes: Mapping[str, int], order: Sequence[str], scale: int) -> tuple[Segment, ...]:
    return tuple(
        Segment(kind_of(name), _percent(size, scale), f"{name}: {numbers.memory(size)}")
        for name in order
        if (size := sizes.get(name, 0))
    )


def _cell(size: int) -> str:
    return numbers.memory(size) if size else ""


def _percent(part: float, of: float) -> float:
    return round(100 * part / of, 3)


def _ticks(scale: int) -> tuple[tuple[float, str], ...]:
    """Round values of one unit, and their places."""
    power = numbers.memory_power(scale)
    top = scale / 1024**power
    rough = top / MAX_TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    gap = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
    return tuple(
        (_percent(k * gap, top), f"{k * gap:g} {numbers.MEMORY_UNITS[power]}" if k else "0")
        for k in range(int(top / gap + 1e-9) + 1)
    )
