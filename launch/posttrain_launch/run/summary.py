"""What a finished run prints: losses and right answers before and after, and where all is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOWN_CHARACTERS = 300  # of each sample answer


def summary_text(run_folder: Path) -> str:
    """The closing text of a run, from metrics.jsonl and answers.json."""
    parts = [_losses(_rows(run_folder / "metrics.jsonl"))]
    answers = run_folder / "answers.json"
    if answers.is_file():
        found = json.loads(answers.read_text(encoding="utf-8"))
        parts += [_matches(found["exact_match"]), _samples(found["samples"])]
    parts.append(_places(run_folder))
    return "\n\n".join(part for part in parts if part)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _losses(rows: list[dict[str, Any]]) -> str:
    evaluated = [row for row in rows if "eval/loss" in row]
    if not evaluated:
        return "no held-out rows, so no held-out loss"
    first, last = evaluated[0], evaluated[-1]
    prefix = "eval_channel_loss/"
    keys = [*sorted(key for key in first.keys() | last.keys() if key.startswith(prefix))]
    lines = [("held-out loss", f"step {first['step']}", f"step {last['step']}")]
    lines += [
        (key.removeprefix(prefix), _number(first.get(key)), _number(last.get(key))) for key in keys
    ]
    lines.append(("all channels", _number(first["eval/loss"]), _number(last["eval/loss"])))
    return align(lines)


def _matches(exact: dict[str, dict[str, dict[str, int]]]) -> str:
    before, after = exact.get("before", {}), exact.get("after", {})
    channels = sorted(before.keys() | after.keys())
    if not channels:
        return ""
    lines = [("right answers", "before", "after")]
    for channel in channels:
        lines.append((channel, _share(before.get(channel)), _share(after.get(channel))))
    return align(lines)


def _samples(samples: list[dict[str, str]]) -> str:
    blocks = []
    for sample in samples:
        lines = [f"sample of {sample['channel']}"]
        for name in ("prompt", "reference", "before", "after"):
            text = " ⏎ ".join(sample.get(name, "").strip().splitlines())
            # A model may say anything, the terminal's control characters included.
            text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
            if len(text) > SHOWN_CHARACTERS:
                text = text[:SHOWN_CHARACTERS] + " …"
            lines.append(f"  {name:<9}  {text}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _places(run_folder: Path) -> str:
    lines = [("run folder", str(run_folder))]
    for name, part in (("report", "report.html"), ("export", "export")):
        if (run_folder / part).exists():
            lines.append((name, str(run_folder / part)))
    return "\n".join(f"{name:<10}  {path}" for name, path in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(count: dict[str, int] | None) -> str:
    return "-" if count is None else f"{count['right']}/{count['of']}"


def align(lines: Sequence[tuple[str, ...]]) -> str:
    """A table: first column left, numbers right, a rule under the heads."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])
