"""What a report is made from: the files of a run folder, and numbers over its steps."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain_dist.files import read_rows

MAX_POINTS = 1200  # of one line: about one a pixel


@dataclass(slots=True)
class Series:
    """Values over steps: x ascends, y is finite."""

    x: list[int] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def smoothed(self) -> Series | None:
        """The mean over a window of about a fifteenth of the line; None for a short line.

        The window is centred, and narrower near the ends, so that the mean does not lag behind.
        """
        count = len(self.y)
        if count < 45:
            return None
        sums = [0.0, *itertools.accumulate(self.y)]
        reach = [min(i, count - 1 - i, count // 30) for i in range(count)]
        means = [(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]
        return Series(self.x, means)


def thin(series: Series, most: int = MAX_POINTS) -> Series:
    """At most `most` points: the ends, and of each stretch its extremes, so that spikes stay."""
    count = len(series.x)
    if count <= most:
        return series
    kept = {0, count - 1}
    stretches = (most - 2) // 2
    for k in range(stretches):
        inside = range(k * count // stretches, (k + 1) * count // stretches)
        kept.add(min(inside, key=series.y.__getitem__))
        kept.add(max(inside, key=series.y.__getitem__))
    chosen = sorted(kept)
    return Series([series.x[i] for i in chosen], [series.y[i] for i in chosen])


def column(rows: list[dict[str, Any]], key: str) -> Series:
    """One metric, where it is a finite number."""
    found = Series()
    for row in rows:
        value = row.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            found.x.append(row["step"])
            found.y.append(float(value))
    return found


@dataclass(slots=True, kw_only=True)
class Run:
    """A run folder as read. What is missing or torn is empty."""

    folder: Path
    rows: list[dict[str, Any]]  # metrics.jsonl: one object a step, ascending
    config_text: str = ""
    config: dict[str, Any]
    overrides: list[str]
    lineage: dict[str, Any]
    plan: dict[str, Any]  # logs/plan.json: of the steps
    planned: dict[str, Any]  # plan.json: of memory and time, before anything started
    ending: dict[str, Any]  # logs/outcome.json
    summary: dict[str, Any]  # of the prepared data
    samples: list[dict[str, Any]]  # of answers.json
    matches: dict[str, dict[str, dict[str, int]]]  # before, after -> channel -> right, of
    finished: bool

    @property
    def last_step(self) -> int:
        """The last logged step."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def total_steps(self) -> int | None:
        """Planned steps, if known."""
        total = self.ending.get("total_steps", self.plan.get("total_steps"))
        return total if isinstance(total, int) else None

    @property
    def outcome(self) -> str:
        """`completed`, `stopped` (someone asked it to), or `not finished` (running or lost)."""
        if self.finished or self.ending.get("outcome") == "completed":
            return "completed"
        return "stopped" if self.ending.get("outcome") == "stopped" else "not finished"

    @property
    def channels(self) -> list[str]:
        """Names in the order of their first appearance."""
        found: dict[str, None] = {}
        for row in self.rows:
            for key in row:
                group, _, name = key.partition("/")
                if group in ("channel_loss", "eval_channel_loss"):
                    found[name] = None
        for counts in self.matches.values():
            found.update(dict.fromkeys(counts))
        return list(found)

    def share(self, channel: str) -> float | None:
        """Mean share of the channel in a logged training step; None if there was no such step."""
        trained = sum("train/loss" in row for row in self.rows)
        # A step without a token of the channel has no entry, which means a share of 0.
        return sum(column(self.rows, f"channel_share/{channel}").y) / trained if trained else None


def read_run(folder: Path) -> Run:
    """Read what there is of a run folder."""
    config_text = _text(folder / "config.yaml")
    overrides = _yaml(_text(folder / "overrides.yaml"))
    answers = _object(folder / "answers.json")
    by_step = {row["step"]: row for row in read_rows(folder / "metrics.jsonl")}
    return Run(
        folder=folder,
        rows=[by_step[step] for step in sorted(by_step)],
        config_text=config_text,
        config=_dict(_yaml(config_text)),
        overrides=[str(item) for item in overrides] if isinstance(overrides, list) else [],
        lineage=_object(folder / "run.json"),
        plan=_object(folder / "logs" / "plan.json"),
        planned=_object(folder / "plan.json"),
        ending=_object(folder / "logs" / "outcome.json"),
        summary=_object(folder / "prepared" / "summary.json"),
        samples=[s for s in answers.get("samples") or [] if isinstance(s, dict)],
        matches={
            when: _dict(_dict(answers.get("exact_match")).get(when)) for when in ("before", "after")
        },
        finished=(folder / "FINISHED").is_file(),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _object(path: Path) -> dict[str, Any]:
    try:
        return _dict(json.loads(_text(path)))
    except ValueError:
        return {}


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
