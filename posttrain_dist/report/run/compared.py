"""What a run that compares answers shows beside its loss: how often it is right, and by how much.

An objective that does so has the metric `<objective>/accuracy`.
"""

from __future__ import annotations

from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.run.charts import Chart, drawn
from posttrain_dist.report.run.read import Run, column
from posttrain_dist.report.text_tables import text_table

_ACCURACY = "/accuracy"
# Title -> column of the objective, and whether more is better.
_CHARTS = {
    "Accuracy": ("accuracy", True),
    "Reward margin": ("margin", True),
    "Log-probability of the better answer": ("chosen_logprob", True),
    "Log-probability of the worse answer": ("rejected_logprob", None),
}
# Column -> what the terminal calls it.
_TABLE = {
    "accuracy": "accuracy",
    "raw_accuracy": "raw accuracy",
    "margin": "reward margin",
    "calibration_error": "calibration error",
}


def objective_of(row: dict[str, Any]) -> str | None:
    """The objective whose comparisons are in a row of metrics.jsonl; None: it compares nothing."""
    names = (key.removesuffix(_ACCURACY) for key in row if key.endswith(_ACCURACY))
    return next((name.removeprefix("eval_") for name in names if name != "eval"), None)


def accuracy_text(row: dict[str, Any]) -> list[str]:
    """Parts of the line of a step: `accuracy 71 %`, and that of the held-out comparisons."""
    name = objective_of(row)
    if name is None:
        return []
    found = []
    for key, before in ((f"{name}/accuracy", ""), (f"eval_{name}/accuracy", "held-out ")):
        if (value := row.get(key)) is not None:
            found.append(f"{before}accuracy {value:.0%}")
    return found


def compared_charts(run: Run) -> list[Chart]:
    """Of training and held-out comparisons over the steps."""
    name = next(filter(None, map(objective_of, reversed(run.rows))), None)
    found = []
    for title, (metric, more_is_better) in _CHARTS.items():
        trained = column(run.rows, f"{name}/{metric}")
        held = column(run.rows, f"eval_{name}/{metric}")
        series = []
        if trained.x:
            smooth = trained.smoothed()
            mark = "thin" if smooth is None else "faint"
            series.append(drawn(trained, "training" if smooth is None else "", "train", mark))
            series += [] if smooth is None else [drawn(smooth, "training", "train", "")]
        if held.x:
            series.append(drawn(held, "held-out", "heldout", "dashed"))
        if not series:
            continue
        chart = Chart(group="compared", title=title, label=title, series=series)
        if len(held.y) > 1:
            first, last = held.y[0], held.y[-1]
            chart.note = f"{_shown(metric, first)} → {_shown(metric, last)}"
            chart.label = f"{title}: held-out from {chart.note.replace('→', 'to')}"
            if more_is_better:
                chart.tone = numbers.tone(last, first)
        found.append(chart)
    return found


def compared_table(rows: list[dict[str, Any]], head: str = "step {step}") -> str:
    """Of held-out comparisons, channel by channel, at the first evaluation and at the last.

    Args:
        head: of a column of numbers, where `step` is that of the evaluation.
    """
    evaluated = [row for row in rows if "eval/loss" in row and objective_of(row)]
    if not evaluated:
        return ""
    name = objective_of(evaluated[-1])
    shown = [evaluated[0], *evaluated[1:][-1:]]
    tables = []
    for metric, title in _TABLE.items():
        prefix = f"eval_{name}_channel_{metric}/"
        keys = sorted({key for row in shown for key in row if key.startswith(prefix)})
        names = {key: key.removeprefix(prefix) for key in keys}
        names[f"eval_{name}/{metric}"] = "all channels"
        cells = [
            (label, *(_shown(metric, row.get(key)) for row in shown))
            for key, label in names.items()
        ]
        if any(row.get(f"eval_{name}/{metric}") is not None for row in shown):
            heads = (f"held-out {title}", *(head.format(step=row.get("step")) for row in shown))
            tables.append(text_table(heads, cells))
    return "\n\n".join(tables)


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return numbers.UNKNOWN
    return f"{value:.1%}" if metric.endswith("accuracy") else f"{value:.3f}"
