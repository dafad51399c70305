"""The section of a report that shows what was planned, and what of it came true."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.plan.fallback_rows import why_not_above
from posttrain_dist.report.plan.plan_figures import device_word, verdict_of
from posttrain_dist.report.plan.plan_page import write_plan_page
from posttrain_dist.report.run.read import Run, column


def plan_of(run: Run) -> dict[str, Any] | None:
    """The plan of a run folder for the page; None: the run was not planned.

    Returns:
        title, text: whether it fits, and what is tightest.
        chosen: the name of the fallback that `auto` took; empty: the method was named.
        why: why those above it were not taken, a sentence each.
        tried: what was started before and ran out of memory, a sentence each.
        rows: (what, planned, measured, difference), the last two empty where nothing was measured.
    """
    plan = run.planned.get("plan")
    if not isinstance(plan, dict):
        return None
    choice = run.planned.get("choice")
    verdict = verdict_of(plan)
    chosen = (choice or {}).get("chosen") or ""
    return {
        "title": verdict.title,
        "text": verdict.text,
        "chosen": chosen["name"] if isinstance(chosen, Mapping) else chosen,
        "why": why_not_above(choice) if choice else [],
        "tried": [
            f"{each.get('tried')} ran out of memory ({each.get('where')}): {each.get('what')}"
            for each in run.lineage.get("fallbacks") or []
        ],
        "warnings": plan["warnings"],
        "rows": _compared(run, plan),
    }


def write_run_plan(run: Run) -> str:
    """Write plan.html beside the plan of a run, and return its name; empty: there is no plan."""
    plan = run.planned.get("plan")
    if not isinstance(plan, dict):
        return ""
    path = run.folder / "plan.html"
    cluster = (run.config.get("cluster") or {}).get("kind")
    verb = "submit" if cluster == "slurm" else "train"
    return write_plan_page(path, plan, run.planned.get("choice"), run.overrides, verb).name


def _compared(run: Run, plan: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rates = column(run.rows, "train/tokens_per_s").y
    rate = statistics.median(rates) if rates else None
    # Of a rank on CPUs, what is measured is its process, whose programs no plan counts.
    used = column(run.rows, "system/memory_bytes").y if plan["on_gpu"] else []
    return [
        _row(
            f"allocated at the peak, each {device_word(plan)}",
            plan["device"]["allocated_bytes"],
            max(used, default=None),
            numbers.memory,
        ),
        _row("tokens/s", plan["speed"]["tokens_per_s"], rate, numbers.count),
    ]


def _row(name: str, planned: float, measured: float | None, text: Any) -> tuple[str, str, str, str]:
    if measured is None:
        return (name, text(planned), "", "")
    return (name, text(planned), text(measured), numbers.change(planned, measured))
