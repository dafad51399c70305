"""The charts of a report, as plain values that report.js draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.page import MAX_CHANNEL_CHARTS
from posttrain_dist.report.run.read import Run, Series, column, thin


@dataclass(slots=True, kw_only=True)
class Chart:
    """One panel. `series` holds {"name", "role", "mark", "x", "y"}; a nameless one has no tip."""

    group: str  # section of the page: loss, compared, channel, system
    title: str
    label: str  # for a screen reader
    series: list[dict[str, Any]]
    unit: str = ""
    note: str = ""  # at the right of the title
    tone: str = ""  # of the note: good, bad
    zero: bool = False  # the y axis begins at 0
    area: bool = False  # the space below the line is filled


def charts_of(run: Run) -> list[Chart]:
    """Every chart that the run has numbers for, channels with the largest share first."""
    channels = sorted(run.channels, key=lambda name: -(run.share(name) or 0.0))
    memory = column(run.rows, "system/memory_bytes")
    power = numbers.memory_power(max(memory.y, default=0.0))
    memory = Series(memory.x, [value / 1024**power for value in memory.y])
    found = [
        _loss_chart(run, "Mean over all channels", "loss", "train/loss", "eval/loss"),
        *(
            _loss_chart(run, name, "channel", f"channel_loss/{name}", f"eval_channel_loss/{name}")
            for name in channels[:MAX_CHANNEL_CHARTS]
        ),
        _system_chart("Learning rate", column(run.rows, "train/lr")),
        _system_chart("Gradient norm", column(run.rows, "train/grad_norm")),
        _system_chart("Throughput", column(run.rows, "train/tokens_per_s"), "tokens/s"),
        _system_chart("Memory of the largest worker", memory, numbers.MEMORY_UNITS[power]),
    ]
    return [chart for chart in found if chart is not None]


def _loss_chart(run: Run, title: str, group: str, key: str, heldout_key: str) -> Chart | None:
    trained, held = column(run.rows, key), column(run.rows, heldout_key)
    series = []
    if trained.x:
        smooth = trained.smoothed()
        if smooth is None:
            series.append(drawn(trained, "training", "train", "thin"))
        else:
            series.append(drawn(trained, "", "train", "faint"))
            series.append(drawn(smooth, "training", "train", ""))
    if held.x:
        series.append(drawn(held, "held-out", "heldout", "dashed"))
    if not series:
        return None
    parts = [
        f"{name} from {numbers.loss(values.y[0])} to {numbers.loss(values.y[-1])}"
        for name, values in (("training", trained), ("held-out", held))
        if values.y
    ]
    chart = Chart(group=group, title=title, label=f"{title}: {', '.join(parts)}", series=series)
    if len(held.y) > 1:
        chart.note = f"{numbers.loss(held.y[0])} → {numbers.loss(held.y[-1])}"
        chart.tone = numbers.tone(held.y[0], held.y[-1])
    return chart


def _system_chart(title: str, values: Series, unit: str = "") -> Chart | None:
    if not values.x:
        return None
    highest = f"{max(values.y):.4g} {unit}".strip()
    return Chart(
        group="system",
        title=title,
        unit=unit,
        label=f"{title} over {len(values.x)} steps, at most {highest}",
        zero=True,
        area=True,
        series=[drawn(values, title.split(" of ")[0].lower(), "train", "thin")],
    )


def drawn(values: Series, name: str, role: str, mark: str) -> dict[str, Any]:
    """One entry of `Chart.series`."""
    kept = thin(values)
    y = [float(f"{value:.6g}") for value in kept.y]
    return {"name": name, "role": role, "mark": mark, "x": kept.x, "y": y}
