"""The progress line says what metrics.jsonl says, once, and for this start of the run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import time
from pathlib import Path

from posttrain_dist.logs import notify
from posttrain_dist.report.run.progress import Progress, describe


def append(folder: Path, **row: float) -> None:
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def test_a_line_of_numbers():
    row = {"step": 3, "train/loss": 1.25, "eval/loss": 2.5, "train/tokens_per_s": 5123.0}
    assert describe(row, 9, 61.4) == (
        "step 3/9  loss 1.2500  held-out loss 2.5000  5.1k tokens/s  1:01 left"
    )


def test_plain_lines_of_a_growing_file(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "plan.json").write_text('{"total_steps": 10, "start_step": 0}')
    append(tmp_path, step=1, **{"train/loss": 99.0})  # of an earlier start
    notify(tmp_path, "of an earlier start")
    out = io.StringIO()
    with Progress(tmp_path, out) as progress:
        for step in range(2, 11):
            append(tmp_path, step=step, time_s=2.0 * step, **{"train/loss": float(step)})
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 11, "train/lo')  # a row that is being written
        progress.post("posted")
        notify(tmp_path, "noticed")
        time.sleep(0.8)
        progress.log("between")
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["posted", "noticed"]
    assert lines[2].startswith("step 2/10  loss 2.0000")
    assert lines[3] == "step 10/10  loss 10.0000"  # the last one, and none between (5 s apart)
    assert lines[4:] == ["between"]


def test_a_live_line_on_a_terminal(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "plan.json").write_text('{"total_steps": 10, "start_step": 0}')

    def follow(out) -> None:
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        with Progress(tmp_path, out) as progress:
            for step in (3, 4):
                row = {"train/loss": 1.5 / step, "train/tokens_per_s": 5123.0 * step}
                append(tmp_path, step=step, time_s=2.0 * step, **row)
                time.sleep(0.5)
            progress.log("between")

    keyboard, screen = pty.openpty()
    with os.fdopen(screen, "w") as out:
        follow(out)
        shown = drain(keyboard)
    os.close(keyboard)
    for line in ("step 3/10  loss 0.5000  15.4k tokens/s", "step 4/10  loss 0.3750  20.5k"):
        assert line in shown
    assert "0:12 left" in shown  # six steps of two seconds
    erase_line, hide_cursor, show_cursor = "\x1b[2K", "\x1b[?25l", "\x1b[?25h"
    assert erase_line in shown
    assert shown.index(hide_cursor) < shown.rindex(show_cursor)
    assert "between\r\n" in shown

    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as out:
        follow(out)
    with os.fdopen(reader) as piped:
        text = piped.read()
    assert text.startswith("step 3/10  loss 0.5000  15.4k tokens/s\n")
    assert "\x1b" not in text and "\r" not in text


def drain(terminal: int) -> str:
    """What was written to a pseudo-terminal so far."""
    os.set_blocking(terminal, False)
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(terminal, 65536):
            parts.append(part)
    return b"".join(parts).decode()


def test_the_time_that_is_left(tmp_path: Path):
    progress = Progress(tmp_path, io.StringIO())
    progress._pace = [(10, 100.0), (14, 108.0)]  # 2 s a step
    assert progress._left_s(20) == 12.0
