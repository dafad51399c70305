"""The fallbacks that were tried, as rows: whether each fits, by how much, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.plan.plan_figures import BILLION, verdict_of


@dataclass(frozen=True, slots=True)
class Fallback:
    """A row of the table of fallbacks; a tried one that was not planned has a reason only."""

    name: str
    fits: bool
    chosen: bool
    spare: str
    item: str  # that takes most where it is tightest
    tokens_per_s: str
    hours: str
    gpu_hours: str
    tokens: str = ""  # that hours and GPU-hours are for
    reason: str = ""

    @property
    def mark(self) -> str:
        """In one word."""
        if not self.fits:
            return "no"
        return "chosen" if self.chosen else "fits"

    @property
    def tone(self) -> str:
        """good, bad or nothing."""
        return "good" if self.fits else "bad" if not self.reason else ""


FALLBACK_HEADS = ("fits", "spare", "most goes to", "tokens/s", "hours", "GPU-hours")


def fallback_rows(choice: Mapping[str, Any]) -> list[Fallback]:
    """Every fallback that was tried, in its order."""
    chosen = choice["chosen"]
    name = chosen["name"] if isinstance(chosen, Mapping) else chosen
    return [_fallback(tried, tried["name"] == name) for tried in choice["tried"]]


def why_not_above(choice: Mapping[str, Any]) -> list[str]:
    """Why the fallbacks before the chosen one were not taken, a sentence each."""
    found = []
    for row, tried in zip(fallback_rows(choice), choice["tried"], strict=True):
        if row.chosen:
            break
        if row.reason:
            found.append(f"{row.name}: {row.reason}")
        elif not row.fits:
            verdict = verdict_of(tried["plan"])
            found.append(f"{row.name} {verdict.title}; {verdict.text}")
        else:
            found.append(f"{row.name} was to fit, and ran out of memory when it was tried")
    return found


def _fallback(tried: Mapping[str, Any], chosen: bool) -> Fallback:
    plan = tried["plan"]
    if plan is None:
        dash = numbers.UNKNOWN
        return Fallback(
            tried["name"], False, chosen, dash, dash, dash, dash, dash, reason=tried["refused"]
        )
    speed = plan["speed"]
    spare, where = plan["spare_bytes"], ""
    if plan["host_spare_bytes"] < 0 <= spare:
        spare, where = plan["host_spare_bytes"], "host: "
    return Fallback(
        tried["name"],
        plan["fits"],
        chosen,
        numbers.memory(spare),
        where + str(plan["largest_item"]),
        numbers.count(speed["tokens_per_s"]),
        numbers.hours(speed["hours"]),
        f"{speed['gpu_hours']:,.4g}",
        numbers.billions(speed["tokens"] or BILLION),
    )
