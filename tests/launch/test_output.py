"""Output that nobody takes stops nothing: pipes without a reader, full disks, ASCII terminals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from posttrain_launch.cli import main
from posttrain_launch.run import stop_request

from posttrain_dist.logs import unfailing, unfailing_output

COMMAND = [sys.executable, "-m", "posttrain_launch.cli"]


def test_a_page_piped_into_head_is_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "-h"], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_closed_standard_output_is_no_output() -> None:
    """As of `posttrain --version >&- 2>&-`: Python has None in their place."""
    script = "import os, sys; os.close(1); os.close(2); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", script, *COMMAND, "--version"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_what_cannot_be_written_is_left_out_and_the_rest_is_not(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    pipe = unfailing(os.fdopen(writer, "w", encoding="utf-8"))
    pipe.write("read")
    pipe.flush()
    assert os.read(reader, 99) == b"read"
    os.close(reader)
    for _ in range(3):
        print("x" * 100_000, file=pipe)  # more than its buffer
    pipe.close()

    with (tmp_path / "log").open("w") as room, Path("/dev/full").open("w") as device:
        full = unfailing(device)
        print("x", file=full, flush=True)
        os.dup2(room.fileno(), full.fileno())  # the disk has room again
        print("y", file=full, flush=True)
    assert (tmp_path / "log").read_text() == "y\n"

    ascii_bytes = io.BytesIO()
    terminal = unfailing(io.TextIOWrapper(ascii_bytes, encoding="ascii"))
    print("loss → 1.5", file=terminal, flush=True)
    assert ascii_bytes.getvalue() == b"loss \\u2192 1.5\n"


def test_the_streams_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with unfailing_output():
        print("inside")
        assert sys.stdout is not before and unfailing(sys.stdout) is sys.stdout
    assert sys.stdout is before and capsys.readouterr().out == "inside\n"


def test_a_full_disk_is_told_without_a_trace(tmp_path, capsys, monkeypatch) -> None:
    from posttrain_launch import failures

    error = OSError(28, "No space left on device", str(tmp_path / "report.html"))
    failures.print_error(error, log=Path("/dev/full"))  # the log is on that disk too
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path}/report.html: cannot be written: no space left on")
    assert "fix: free space" in told


# ------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("before", "asked"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)], ids=["plain", "nohup"]
)
def test_a_hang_up_asks_for_a_save_unless_it_is_ignored(before, asked, tmp_path: Path) -> None:
    posted: list[str] = []
    outside = signal.signal(signal.SIGHUP, before)
    try:
        with stop_request.stopped_by_signals(tmp_path, log=posted.append):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # of the shell and of the terminal
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, outside)
    assert (tmp_path / "STOP").exists() is asked
    assert posted == (["SIGHUP: saving and leaving"] if asked else [])


def test_a_folder_that_takes_no_stop_file_does_not_end_the_run(tmp_path: Path) -> None:
    posted: list[str] = []
    with stop_request.stopped_by_signals(tmp_path / "removed", log=posted.append):
        os.kill(os.getpid(), signal.SIGTERM)
    (line,) = posted
    assert line.startswith("SIGTERM: cannot ask the run to save: ")


def test_a_run_whose_terminal_goes_saves_and_leaves(tiny_llama, builders, tmp_path) -> None:
    """In an ASCII locale; its output is a pipe whose reader ends; then the session hangs up."""
    rows = [*builders.rows(), builders.chat("grüße 你好", "✓ größer", "übung")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    words = [f"model.path={tiny_llama}", f"data.train={data}", f"output_root={tmp_path}/out"]
    words += ["data.max_length=128", "train.steps=5000", "train.batch_size=1", "logging.wandb=off"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.Popen(
        [*COMMAND, "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # this may be under nohup
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        shown = b""
        while b"step 0" not in shown:  # past the tables and the first number
            part = os.read(process.stdout.fileno(), 65536)
            assert part, process.stderr.read().decode()
            shown += part
        process.stdout.close()  # tee has died
        deadline = time.monotonic() + 60
        (metrics,) = (tmp_path / "out" / "run").glob("2*/metrics.jsonl")
        while metrics.read_bytes().count(b"\n") < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.stderr.close()
    shown.decode("ascii")
    assert "übung" in (metrics.parent / "data_report.json").read_text(encoding="utf-8")
    stopped = json.loads((metrics.parent / "logs" / "outcome.json").read_text())
    step = stopped["step"]
    assert stopped["outcome"] == "stopped" and 4 <= step < 5000
    kept = (metrics.parent / "logs" / "driver.log").read_text(encoding="utf-8")
    assert f"saved and left at step {step} of 5000; go on with: posttrain run" in kept
    assert (metrics.parent / "checkpoints" / f"step-{step:06d}" / "MANIFEST.json").is_file()


def test_a_training_does_not_need_its_output(tiny_llama, rows_file, tmp_path, monkeypatch) -> None:
    words = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={tmp_path}/out"]
    words += ["data.max_length=128", "train.steps=2", "train.batch_size=1", "logging.wandb=off"]
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = stack.enter_context(Path("/dev/full").open("w", encoding="utf-8"))
            monkeypatch.setattr(sys, name, stream)
        assert main(["train", *words, "eval.generate_rows=0"]) == 0
    assert len(list((tmp_path / "out" / "run").glob("2*/FINISHED"))) == 1
