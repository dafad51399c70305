"""Cards, table and header of sweep.html: every number that stands as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.numbers import UNKNOWN
from posttrain_dist.report.page import Card
from posttrain_dist.report.sweep.axes import short_key

TONES = {"done": "good", "failed": "bad", "pruned": "warn", "stopped": "warn"}
ORDER = ("done", "running", "waiting", "pruned", "stopped", "failed")
MOST_KEYS = 8  # columns of the table; a sweep of more has them in one


def metric_name(metric: str) -> str:
    """`eval/loss` in words; a channel's by its name."""
    if metric == "eval/loss":
        return "Held-out loss"
    prefix = "eval_channel_loss/"
    channel = metric.removeprefix(prefix)
    return f"Held-out loss of {channel}" if metric.startswith(prefix) else metric


def header_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Name, outcome, and what was searched."""
    states = Counter(trial["state"] for trial in data["trials"])
    going = states["running"] + states["waiting"] + states["stopped"]
    outcome = f"completed, {states['failed']:,} failed" if states["failed"] else "completed"
    created = str(data["created"]).replace("T", " ")[:16]
    trials = numbers.plural(len(data["trials"]), "trial")
    goal = "the smaller the better" if data["direction"] == "minimize" else "the larger the better"
    return {
        "name": data["name"],
        "outcome": "not finished" if going else outcome,
        "tone": "warn" if going or states["failed"] else "good",
        "lead": " · ".join(part for part in (created, trials) if part),
        "facts": [
            ("varies", ", ".join(data["keys"]) or "nothing"),
            ("metric", f"{data['metric']}, {goal}"),
            *((state, f"{states[state]:,}") for state in ORDER if states[state]),
        ],
    }


def cards_of(data: Mapping[str, Any]) -> list[Card]:
    """The key figures that there are numbers for."""
    trials = data["trials"]
    found = []
    best = _best(data)
    if best is not None:
        settings = ", ".join(f"{key}={value}" for key, value in best["varied"].items())
        found.append(
            Card(
                label=f"{metric_name(data['metric'])} of the best",
                value=numbers.loss(best["value"]),
                unit=f"trial {best['number']}",
                sub=settings or "nothing varies",
                wide=True,
            )
        )
        rest = [t["value"] for t in trials if t["value"] is not None and t["state"] == "done"]
        if len(rest) > 1:
            sign = max if data["direction"] == "minimize" else min
            worst = sign(rest)
            found.append(
                Card(
                    label="From worst to best",
                    value=numbers.change(worst, best["value"]),
                    sub=f"the worst that ran to its end has {numbers.loss(worst)}",
                )
            )
    cost = sum(trial["cost_s"] or 0 for trial in trials)
    if cost:
        lost = sum(t["cost_s"] or 0 for t in trials if t["state"] in ("pruned", "failed"))
        text, unit = cost_text(cost), f"{data['unit']}-{'hours' if cost >= 3600 else 'seconds'}"
        sub = f"{numbers.share_of(lost, cost)} on trials that were given up or failed"
        found.append(Card(label="Cost of all trials", value=text, unit=unit, sub=sub))
    memory = [trial["memory_bytes"] for trial in trials if trial["memory_bytes"]]
    if memory:
        value, unit = numbers.memory(max(memory)).rsplit(" ", 1)
        sub = "of the largest worker of any trial"
        found.append(Card(label="Peak memory", value=value, unit=unit, sub=sub))
    return found


def cost_text(seconds: float) -> str:
    """Seconds, in hours from one hour on; the unit is not written."""
    return f"{seconds / 3600:,.3g}" if seconds >= 3600 else f"{seconds:,.0f}"


def table_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and rows of the table, in the order of the data: the best first."""
    keys = data["keys"] if len(data["keys"]) <= MOST_KEYS else []
    best = _best(data)
    rows = []
    for trial in data["trials"]:
        varied = trial["varied"]
        value = trial["value"]
        against = best["value"] if best is not None and best is not trial else None
        rows.append(
            {
                "number": trial["number"],
                "is_best": best is trial,
                "settings": [str(varied.get(key, UNKNOWN)) for key in keys]
                or [" ".join(f"{key}={text}" for key, text in varied.items()) or UNKNOWN],
                "state": trial["state"],
                "tone": TONES.get(trial["state"], ""),
                "value": UNKNOWN if value is None else f"{value:.4f}",
                "behind": UNKNOWN
                if value is None or against is None
                else numbers.change(against, value),
                "step": _steps(trial),
                "cost": cost_seconds(trial),
                "memory": numbers.memory(trial["memory_bytes"])
                if trial["memory_bytes"]
                else UNKNOWN,
                "error": trial.get("error") or "",
                "folder": trial["folder"].rstrip("/").rpartition("/")[2],
            }
        )
    return {
        "keys": [short_key(key, keys) for key in keys] or ["Settings"],
        "metric": metric_name(data["metric"]),
        "cost": f"{data['unit']}-seconds",
        "rows": rows,
    }


def cost_seconds(trial: Mapping[str, Any]) -> str:
    """What a trial cost, in seconds of the sweep's unit."""
    return f"{trial['cost_s']:,.0f}" if trial["cost_s"] else UNKNOWN


def _steps(trial: Mapping[str, Any]) -> str:
    step, total = trial["step"], trial["total_steps"]
    if step is None:
        return UNKNOWN
    return f"{step:,} of {total:,}" if total else f"{step:,}"


def _best(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = next(
        (trial for trial in data["trials"] if trial["number"] == data["best"]), None
    )
    return found
