"""Held-out curves of the best trials: the metric of several, each channel of the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.page import MAX_CHANNEL_CHARTS

TOTAL, CHANNEL = "eval/loss", "eval_channel_loss/"
NUM_DRAWN = 6  # trials in the chart of the metric; the stylesheet has a colour for each
NUM_FAINT = 3  # trials behind the best in a chart of one channel


def drawn_trials(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The trials whose curves are drawn, the best first."""
    return [trial for trial in data["trials"] if trial["curves"]][:NUM_DRAWN]


def charts_of(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The charts for report.js: the metric of the best trials, then each channel of the best."""
    trials = drawn_trials(data)
    if not trials:
        return []
    metric = data["metric"]
    found = [_chart("loss", metric, metric, trials)]
    keys = list(dict.fromkeys(key for trial in trials[:1] for key in trial["curves"]))
    channels = [key for key in keys if key.startswith(CHANNEL)][:MAX_CHANNEL_CHARTS]
    titled = [(TOTAL, "all channels")] if metric != TOTAL else []
    titled += [(key, key.removeprefix(CHANNEL)) for key in channels]
    found += [_chart("channel", key, title, trials[: 1 + NUM_FAINT]) for key, title in titled]
    return [chart for chart in found if chart["series"]]


def _chart(group: str, key: str, title: str, trials: list[Mapping[str, Any]]) -> dict[str, Any]:
    series: list[dict[str, Any]] = []
    for i, trial in reversed(list(enumerate(trials))):  # the best above the others
        points = _trained(trial["curves"].get(key) or [])
        if not points:
            continue
        series.append(
            {
                "name": f"trial {trial['number']}",
                "role": f"t{i}",
                "mark": "dashed" if len(points) == 1 else "" if i == 0 else "thin",
                "x": [int(step) for step, _ in points],
                "y": [float(f"{value:.6g}") for _, value in points],
            }
        )
    chart = {"group": group, "title": title, "unit": "", "note": "", "tone": "", "zero": False,
             "area": False, "series": series, "label": f"{title}: {_ends(series)}"}  # fmt: skip
    best = [value for _, value in trials[0]["curves"].get(key) or []]
    if len(best) > 1:
        chart["note"] = f"{numbers.loss(best[0])} → {numbers.loss(best[-1])}"
        chart["tone"] = numbers.tone(best[0], best[-1])
    return chart


def _trained(points: list[list[float]]) -> list[list[float]]:
    """Without the value before the first step, which all trials have and the scale would follow."""
    later = [point for point in points if point[0] > 0]
    return later or points


def _ends(series: list[dict[str, Any]]) -> str:
    return ", ".join(f"{each['name']} to {numbers.loss(each['y'][-1])}" for each in series)
