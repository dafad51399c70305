"""Verdict and figures of a data report, the same for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.numbers import plural, whole
from posttrain_dist.report.page import Card

SPLITS = {"train": "Training", "eval": "Held-out"}
# Key in data_report.json -> head of the column.
COUNTS = {
    "rows": "rows",
    "samples": "samples",
    "tokens": "tokens",
    "supervised": "supervised",
    "truncated": "truncated",
    "dropped": "dropped",
    "duplicates": "duplicates",
    "near_duplicates": "near duplicates",
}


@dataclass(slots=True)
class Point:
    """One thing that a reader should know before training."""

    tone: str  # bad: training must not start; warn
    text: str
    link: str  # id of the part of the page that shows it


@dataclass(slots=True)
class Verdict:
    """The report in one line, and what it rests on."""

    tone: str  # good, warn, bad
    word: str
    title: str
    text: str
    points: list[Point]


def channels_of(report: dict[str, Any]) -> list[str]:
    """All channels that the report names, in its order."""
    names = dict.fromkeys(report.get("channels") or [])
    for split in SPLITS:
        names.update(dict.fromkeys(_split(report, split)))
    return list(names)


def verdict_of(report: dict[str, Any]) -> Verdict:
    """Whether this data can be trained on."""
    checks = checks_of(report)
    failing = [check for check in checks if check["failed"]]
    points = [
        Point(
            "bad" if check["level"] == "error" else "warn",
            f"{check['name']}: {check['failed']:,} of {check['checked']:,} fail",
            f"check-{i}",
        )
        for i, check in enumerate(failing)
    ]
    points += _other_points(report)
    bad = sum(point.tone == "bad" for point in points)
    warnings = len(points) - bad
    passed = len(checks) - len(failing)
    outcome = f"{passed:,} of {plural(len(checks), 'check')} passed"
    if warnings and bad:
        outcome += f", {plural(warnings, 'warning')}"
    if bad:
        # Where the checks are not strict, training starts all the same.
        strict = (report.get("settings") or {}).get("strict") is not False
        title = "Training does not start on this data" if strict else "This data has faults"
        errors = plural(bad, "error")
        return Verdict("bad", errors, f"{title}: {errors}", outcome, points)
    if not checks:
        text = "Nothing is known about templates and masks."
        return Verdict("warn", "unchecked", "No check was made", text, points)
    if warnings:
        title = f"Fit to train on, with {plural(warnings, 'warning')}"
        return Verdict("warn", plural(warnings, "warning"), title, outcome, points)
    title = "The one check passed" if passed == 1 else f"All {passed:,} checks passed"
    return Verdict("good", "passed", title, "Nothing stands in the way of training.", points)


def _other_points(report: dict[str, Any]) -> list[Point]:
    """What is wrong beside the checks."""
    found = []
    train = _split(report, "train")
    if train and not sum(counts.get("samples", counts.get("rows", 0)) for counts in train.values()):
        found.append(Point("bad", "there is no training sample", "channels"))
    for channel, counts in train.items():
        if counts.get("rows") and counts.get("supervised") == 0:
            text = f"channel {channel} has no supervised token"
            found.append(Point("bad", text, "channels"))
    if rejected := rejected_total(report):
        is_are = "row was" if rejected == 1 else "rows were"
        found.append(Point("warn", f"{rejected:,} {is_are} rejected and left out", "rejected"))
    if leaks := report.get("near_leaks"):
        have = "row has" if leaks == 1 else "rows have"
        text = f"{leaks:,} held-out {have} a near duplicate in training"
        found.append(Point("warn", text, "channels"))
    return found


def turns_line(report: dict[str, Any]) -> str:
    """How many rows are trained turn by turn, and what that costs; empty: none is."""
    turns = report.get("turns") or {}
    if not turns.get("rows"):
        return ""
    chosen = (report.get("settings") or {}).get("form") == "turns"
    why = "template.form=turns" if chosen else "whole, they are not what inference shows"
    return (
        f"{turns['rows']:,} of {turns['of']:,} rows are trained turn by turn ({why}): "
        f"{turns['samples']:,} samples, {turns['tokens'] / turns['whole']:.2f} times the tokens of "
        "whole conversations"
    )


def checks_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks: errors that fail, warnings that fail, then those that passed."""
    checks = [
        {
            "name": str(check.get("name", "")),
            "level": str(check.get("level", "error")),
            "explain": str(check.get("explain") or ""),
            "fix": str(check.get("fix") or ""),
            "checked": int(check.get("checked") or 0),
            "failed": int(check.get("failed") or 0),
            "rows": [str(row) for row in check.get("rows") or []],
        }
        for check in report.get("checks") or []
    ]
    return sorted(checks, key=lambda c: 2 if not c["failed"] else int(c["level"] != "error"))


def rejected_total(report: dict[str, Any]) -> int:
    """Rows left out as unusable, over all files; at least as many as are listed."""
    counted = sum(int(file.get("rejected") or 0) for file in report.get("files") or [])
    return max(counted, len(report.get("rejected") or []))


def left_out_total(report: dict[str, Any]) -> int:
    """Rows left out because they have the weight 0, over all files."""
    return sum(int(file.get("left_out") or 0) for file in report.get("files") or [])


def totals_of(report: dict[str, Any], split: str) -> dict[str, int]:
    """Each count added up over the channels of a split."""
    channels = _split(report, split).values()
    return {key: sum(int(counts.get(key) or 0) for counts in channels) for key in COUNTS}


def channel_table(
    report: dict[str, Any], split: str, count: Callable[[int | None], str] = whole
) -> list[dict[str, Any]]:
    """One row a channel and, for several, their sum: name, cells, share of tokens supervised.

    Args:
        count: a count as text.
    """
    channels = _split(report, split)
    named = [(name, channels[name]) for name in channels_of(report) if name in channels]
    rows = [_channel_row(name, counts, count) for name, counts in named]
    if len(rows) > 1:
        row = _channel_row("all channels", totals_of(report, split), count)
        rows.append(row | {"total": True})
    return rows


def _channel_row(
    name: str, counts: dict[str, Any], count: Callable[[int | None], str]
) -> dict[str, Any]:
    tokens, supervised = counts.get("tokens") or 0, counts.get("supervised") or 0
    return {
        "name": name,
        "cells": [(key, count(counts.get(key))) for key in COUNTS],
        "share": numbers.share_of(supervised, tokens),
        "share_width": numbers.bar_width(supervised, tokens),
        "starved": bool(counts.get("rows")) and not supervised,
        "total": False,
    }


def cards_of(report: dict[str, Any]) -> list[Card]:
    """The totals of a report."""
    train, held = totals_of(report, "train"), totals_of(report, "eval")
    both = {key: train[key] + held[key] for key in COUNTS}

    def split(key: str) -> str:
        return f"{train[key]:,} training · {held[key]:,} held-out"

    def tone(count: int) -> str:
        return "" if count else "good"

    share = numbers.share_of(both["supervised"], both["tokens"])
    limit = (report.get("settings") or {}).get("max_length")
    longer = f"rows above {limit:,} tokens" if limit else "rows above the longest allowed"
    dropped = f"{longer}; {both['dropped']:,} dropped"
    doubles = f"exact, and {both['near_duplicates']:,} near"
    moved = int(report.get("duplicates_moved") or 0)
    leaks, rejected = int(report.get("near_leaks") or 0), rejected_total(report)
    bad = f"in {plural(len(report.get('files') or []), 'file')}"
    if left_out := left_out_total(report):
        bad += f"; {left_out:,} of weight 0 left out"
    return [
        Card(label="Rows", value=f"{both['rows']:,}", sub=split("rows")),
        Card(label="Samples", value=f"{both['samples']:,}", sub=split("samples")),
        Card(label="Tokens", value=f"{both['tokens']:,}", sub=split("tokens")),
        Card(label="Supervised", value=share, sub=split("supervised")),
        Card(label="Truncated", value=f"{both['truncated']:,}", sub=dropped),
        Card(label="Rejected rows", value=f"{rejected:,}", sub=bad, tone=tone(rejected)),
        Card(label="Duplicates", value=f"{both['duplicates']:,}", sub=doubles),
        Card(
            label="Held-out leaks",
            value=f"{leaks:,}",
            sub=f"near; {moved:,} exact left to training",
            tone=tone(leaks),
        ),
    ]


def source_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a source: what share was asked for, what it got of rows and tokens."""
    sources = report.get("sources") or {}
    keys = ("asked", "rows_share", "token_share")
    most = max((s.get(key) or 0.0 for s in sources.values() for key in keys), default=0.0)
    return [
        {
            "name": name,
            "shares": [
                {
                    "text": numbers.share(source.get(key)),
                    "width": numbers.bar_width(source.get(key) or 0.0, most),
                }
                for key in keys
            ],
            "passes": numbers.times(source.get("passes")),
        }
        for name, source in sources.items()
    ]


def _split(report: dict[str, Any], split: str) -> dict[str, Any]:
    return (report.get("splits") or {}).get(split) or {}
