"""The table of a sweep, for the terminal and trials.txt."""

from __future__ import annotations

from typing import Any

from posttrain_dist.report.numbers import loss_of_log, memory
from posttrain_dist.report.text_tables import text_table


def table_text(results: dict[str, Any]) -> str:
    """One line a trial, the best first.

    Args:
        results: of `sweep.results.read_results`.
    """
    metric = results["metric"]
    if metric == "eval/loss" or (metric.startswith("eval_") and metric.endswith("/accuracy")):
        metric = f"held-out {metric.partition('/')[2]}"
    heads = ("trial", "what differs", "state", metric, "step", f"{results['unit']}-seconds",
             "peak memory", "run folder")  # fmt: skip
    rows = [
        (
            str(trial["number"]),
            " ".join(f"{key}={value}" for key, value in trial["varied"].items()) or "-",
            trial["state"],
            loss_of_log(trial["value"]),
            "-" if trial["step"] is None else str(trial["step"]),
            _seconds(trial["cost_s"]) if trial["seconds"] else "-",
            "-" if trial["memory_bytes"] is None else memory(trial["memory_bytes"]),
            trial["folder"],
        )
        for trial in results["trials"]
    ]
    return text_table(heads, rows, names=3)


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def results_text(results: dict[str, Any]) -> str:
    """The table, why trials failed, and the command of the best."""
    lines = [table_text(results)]
    failed = [trial for trial in results["trials"] if trial["state"] == "failed"]
    for trial in failed:
        why = trial["error"] or f"its log: {trial['folder']}/logs/driver.log"
        lines.append(f"\ntrial {trial['number']} failed: {why}")
    if results["winner"]:
        best = results["best"]
        lines.append(f"\nthe best, trial {best}, as a run of its own:\n  {results['winner']}")
        if any(word.startswith("train.steps=") for word in _words(results)):
            lines.append("  (train.steps ends it early: leave it out to train on all of the data)")
    return "\n".join(lines)


def _words(results: dict[str, Any]) -> list[str]:
    chosen = next(each for each in results["trials"] if each["number"] == results["best"])
    return [*chosen["overrides"]]
