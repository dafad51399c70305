"""sweep.html: one table of every trial, a heat map, curves, and the command of the winner.

plain data -> figures, axes, heat map, curves -> assets/report/sweep.html.j2, sweep.css, report.js
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain_dist.files import write_atomic
from posttrain_dist.report.page import asset, render
from posttrain_dist.report.sweep.curves import charts_of, drawn_trials
from posttrain_dist.report.sweep.figures_of_sweep import cards_of, header_of, table_of
from posttrain_dist.report.sweep.heat_map import heat_map
from posttrain_dist.report.sweep.parallel import parallel


def write_sweep_page(path: Path, data: Mapping[str, Any]) -> Path:
    """Write a sweep as one self-contained page, and return its path.

    Args:
        data: {"name", "folder", "command", "created", "metric", "direction", "keys": those that
            vary, "unit": "GPU" or "process", "best": number of the best trial or None, "winner":
            its command or None, "trials": [...]}, the best trial first; each {"number", "varied":
            {key: text}, "state", "error", "value": of the metric or None, "step", "total_steps",
            "cost_s", "memory_bytes", "curves": {held-out key: [[step, value], ...]}, "folder"}.
    """
    write_atomic(path, sweep_page(data))
    return path


def sweep_page(data: Mapping[str, Any]) -> str:
    """The page as text; see `write_sweep_page`."""
    from markupsafe import Markup

    charts = charts_of(data)
    return render(
        "sweep.html.j2",
        css=Markup(asset("report.css") + asset("sweep.css")),
        js=Markup(asset("report.js")),
        sweep=header_of(data),
        cards=cards_of(data),
        winner=data["winner"] or "",
        table=table_of(data),
        map=heat_map(data),
        parallel=parallel(data),
        charts=charts,
        drawn=[trial["number"] for trial in drawn_trials(data)],
        command=data["command"],
        written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        folder=data["folder"],
    )
