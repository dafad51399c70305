"""What a finished run prints: losses and right answers before and after, and where all is."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from posttrain_dist.report.numbers import loss_of_log
from posttrain_dist.report.run.compared import compared_table
from posttrain_dist.report.run.read import read_run
from posttrain_dist.report.text_tables import text_table

MAX_CHARACTERS = 300  # of each sample answer


def run_text(run_folder: Path) -> str:
    """The closing text of a run, from metrics.jsonl and answers.json."""
    run = read_run(run_folder)
    parts = [
        _losses(run.rows),
        compared_table(run.rows),
        _matches(run.matches["before"], run.matches["after"]),
        _samples(run.samples),
        _places(run_folder),
    ]
    return "\n\n".join(part for part in parts if part)


def _losses(rows: list[dict[str, Any]]) -> str:
    evaluated = [row for row in rows if "eval/loss" in row]
    if not evaluated:
        return "no held-out rows, so no held-out loss"
    # One that went on from another run's checkpoint may have been evaluated once.
    shown = [evaluated[0], *evaluated[1:][-1:]]
    prefix = "eval_channel_loss/"
    keys = sorted({key for row in shown for key in row if key.startswith(prefix)})
    names = {key: key.removeprefix(prefix) for key in keys} | {"eval/loss": "all channels"}
    return text_table(
        ("held-out loss", *(f"step {row['step']}" for row in shown)),
        [(name, *(loss_of_log(row.get(key)) for row in shown)) for key, name in names.items()],
    )


def _matches(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> str:
    channels = sorted(before.keys() | after.keys())
    if not channels:
        return ""
    return text_table(
        ("right answers", "before", "after"),
        [
            (channel, _right_of(before.get(channel)), _right_of(after.get(channel)))
            for channel in channels
        ],
    )


def _samples(samples: list[dict[str, Any]]) -> str:
    blocks = []
    for sample in samples:
        lines = [f"sample of {sample['channel']}"]
        for name in ("prompt", "reference", "before", "after"):
            text = " ⏎ ".join(sample.get(name, "").strip().splitlines())
            # A model may write anything, the terminal's control characters included.
            text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
            if len(text) > MAX_CHARACTERS:
                text = text[:MAX_CHARACTERS] + " …"
            lines.append(f"  {name:<9}  {text}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _places(run_folder: Path) -> str:
    lines = [("run folder", str(run_folder))]
    for name, part in (("report", "report.html"), ("export", "export"), ("adapter", "adapter")):
        if (run_folder / part).exists():
            lines.append((name, str(run_folder / part)))
    if offline := sorted(map(str, (run_folder / "wandb").glob("offline-run-*"))):
        lines.append(("W&B", f"offline; send it with: {shlex.join(['wandb', 'sync', *offline])}"))
    return "\n".join(f"{name:<10}  {path}" for name, path in lines)


def _right_of(count: dict[str, int] | None) -> str:
    return "-" if count is None else f"{count['right']}/{count['of']}"
