"""Lengths of samples by channel, as bars whose places are shares of a panel's width and height."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.page import MAX_CHANNEL_CHARTS

MAX_TICKS = 6


@dataclass(slots=True, kw_only=True)
class Bar:
    """One bin; places and sizes in per cent of the panel."""

    left: float
    width: float
    train: float  # height of the training bar
    heldout: float | None  # height of the held-out line; null: the bin has no held-out sample
    over: bool  # longer than data.max_length
    tip: str


@dataclass(slots=True, kw_only=True)
class Panel:
    """The histogram of one channel."""

    title: str
    note: str
    label: str  # for a screen reader
    bars: list[Bar]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    limit: float | None  # where data.max_length is


@dataclass(slots=True)
class _Axis:
    """Tokens on a logarithmic scale."""

    low: float
    high: float

    def place(self, tokens: float) -> float:
        return round(100 * math.log(tokens / self.low) / math.log(self.high / self.low), 3)

    def ticks(self) -> list[tuple[float, str]]:
        first, last = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
        step = max(1, math.ceil((last - first + 1) / MAX_TICKS))
        return [
            (self.place(2**k), numbers.power_of_two(2**k))
            for k in range(max(0, first), last + 1, step)
        ]


def panels_of(report: dict[str, Any], channels: list[str]) -> list[Panel]:
    """A panel for each channel with lengths, those of most samples; all on one axis.

    `lengths` holds `[upper edge, count]` in ascending order, on one grid of edges for all: a bin
    is what lies above the edge before it, up to and with its own.
    """
    splits = {
        split: {
            channel: [(float(edge), int(count)) for edge, count in counts.get("lengths") or []]
            for channel, counts in (report.get("splits", {}).get(split) or {}).items()
        }
        for split in ("train", "eval")
    }
    of = {
        channel: (splits["train"].get(channel, []), splits["eval"].get(channel, []))
        for channel in channels
    }
    of = {channel: both for channel, both in of.items() if any(_total(some) for some in both)}
    most = sorted(of, key=lambda channel: -sum(map(_total, of[channel])))[:MAX_CHANNEL_CHARTS]
    edges = sorted({edge for both in of.values() for some in both for edge, _ in some if edge > 0})
    if not edges:
        return []
    limit = report.get("settings", {}).get("max_length")
    axis = _Axis(_lower(edges, 0), max(edges[-1], limit or 0) * 1.04)
    return [_panel(channel, *of[channel], edges, axis, limit) for channel in of if channel in most]


def sparkline(lengths: list[list[float]]) -> str:
    """The counts as a row of blocks, from the first to the last bin that is not empty."""
    counts = [int(count) for _, count in lengths]
    used = [i for i, count in enumerate(counts) if count]
    if not used:
        return ""
    counts = counts[used[0] : used[-1] + 1]
    heights = [math.ceil(8 * count / max(counts)) for count in counts]
    return "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights)


def half_length(lengths: list[list[float]]) -> int | None:
    """The upper edge of the bin that the median is in."""
    left = sum(count for _, count in lengths) / 2
    for edge, count in lengths:
        left -= count
        if count and left <= 0:
            return int(edge)
    return None


def _panel(
    channel: str,
    train: list[tuple[float, int]],
    heldout: list[tuple[float, int]],
    edges: list[float],
    axis: _Axis,
    limit: int | None,
) -> Panel:
    counts = [dict(train), dict(heldout)]
    totals = [_total(train), _total(heldout)]
    shares = [
        [some.get(edge, 0) / total if total else 0.0 for edge in edges]
        for some, total in zip(counts, totals, strict=True)
    ]
    top = max(map(max, shares)) * 1.08
    bars = []
    for i, edge in enumerate(edges):
        found = [some.get(edge, 0) for some in counts]
        if not any(found):
            continue
        lower = _lower(edges, i)
        left = axis.place(lower)
        span = f"{int(lower) + 1:,} to {int(edge):,}" if int(lower) + 1 < edge else f"{int(edge):,}"
        lines = [f"{span} {'token' if span == '1' else 'tokens'}"]
        lines += [
            f"{name} {count:,} ({numbers.share(share[i])})"
            for name, count, share, total in zip(
                ("training", "held-out"), found, shares, totals, strict=True
            )
            if total
        ]
        bars.append(
            Bar(
                left=left,
                width=round(axis.place(edge) - left, 3),
                train=round(100 * shares[0][i] / top, 2),
                heldout=round(100 * shares[1][i] / top, 2) if found[1] else None,
                over=limit is not None and lower >= limit,
                tip="\n".join(lines),
            )
        )
    half = half_length([list(pair) for pair in train or heldout])
    longest = max(edge for some in (train, heldout) for edge, count in some if count)
    note = f"half ≤ {half:,} · all ≤ {int(longest):,}"
    return Panel(
        title=channel,
        note=note,
        label=f"Lengths of {sum(totals):,} samples of {channel}: {note} tokens",
        bars=bars,
        x_ticks=axis.ticks(),
        y_ticks=_share_ticks(top),
        limit=axis.place(limit) if limit and limit >= axis.low else None,
    )


def _total(lengths: list[tuple[float, int]]) -> int:
    return sum(count for _, count in lengths)


def _lower(edges: list[float], i: int) -> float:
    # No bin is wider than an octave: where a bin is left out because it is empty, the next one
    # must not fill its place.
    return max(edges[i - 1] if i else 0.0, edges[i] / 2)


def _share_ticks(top: float) -> list[tuple[float, str]]:
    gaps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5)
    gap = next((gap for gap in gaps if top / gap < 4.5), 0.5)
    count = int(top / gap + 1e-9)
    return [(round(100 * k * gap / top, 3), f"{100 * k * gap:.0f}%") for k in range(count + 1)]
