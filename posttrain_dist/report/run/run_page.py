"""report.html of a run folder: one page, self-contained, made from what is there.

run folder -> Run (read) -> charts, figures, blocks (plain values) -> assets/report/*.j2, css, js
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

from posttrain_dist.errors import PosttrainError
from posttrain_dist.files import write_atomic
from posttrain_dist.report.blocks import blocks, data_blocks
from posttrain_dist.report.page import MAX_CHANNEL_CHARTS, asset, render
from posttrain_dist.report.run.alarm_section import alarms_of
from posttrain_dist.report.run.calibration import calibration_of
from posttrain_dist.report.run.charts import charts_of
from posttrain_dist.report.run.compared import compared_charts
from posttrain_dist.report.run.figures import (
    cards_of,
    channel_rows,
    command_of,
    header_of,
    loss_of_objective,
    sample_of,
)
from posttrain_dist.report.run.plan_section import plan_of, write_run_plan
from posttrain_dist.report.run.read import Run, read_run


def write_report(run_folder: Path) -> Path:
    """Write `report.html`, and `plan.html` of a planned run, into the run folder.

    Everything is optional but the config or one line of metrics: a run that is still going, was
    stopped or has no held-out data gives a page with what it has.

    Returns:
        The path of report.html.

    Raises:
        PosttrainError: the folder is not there, or is no run folder.
    """
    folder = Path(run_folder)
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise PosttrainError(
            "is no run folder: it has neither config.yaml nor metrics.jsonl",
            where=str(folder),
            fix="give a folder that `posttrain train` made, outputs/<name>/<time>",
        )
    page = _render(read_run(folder))
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def _render(run: Run) -> str:
    from markupsafe import Markup

    charts = [*charts_of(run), *compared_charts(run)]
    channels = channel_rows(run)
    lineage = {key: value for key, value in run.lineage.items() if key != "command"}
    if inputs := run.summary.get("inputs"):
        lineage["prepared from"] = inputs
    return render(
        "report.html.j2",
        css=Markup(asset("report.css")),
        js=Markup(asset("report.js")),
        run=header_of(run),
        cards=cards_of(run, channels),
        charts=charts,
        loss_is=loss_of_objective(run),
        drawn=[dataclasses.asdict(chart) for chart in charts],
        smoothed=any(len(chart.series) > 2 for chart in charts),
        channels=channels,
        channels_hidden=len(channels) > MAX_CHANNEL_CHARTS,
        has_match=any(run.matches.values()),
        has_base=bool(run.matches["before"]) or any(s.get("before") for s in run.samples),
        samples=[sample_of(sample) for sample in run.samples],
        alarms=alarms_of(run.folder),
        calibration=calibration_of(run.folder),
        data=data_blocks(run.summary),
        data_page="data_report.html" if (run.folder / "data_report.html").is_file() else "",
        plan=plan_of(run),
        plan_page=write_run_plan(run),
        command=command_of(run),
        overrides=run.overrides,
        config=run.config_text.strip(),
        lineage=blocks(lineage),
        written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        folder=str(run.folder.resolve()),
    )
