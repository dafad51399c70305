"""A run on this machine, watched from another process: status, logs, cancel, and what is left."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import forkserver
import pytest
from posttrain_launch.cli import main
from posttrain_launch.run.driver_lock import find_driver
from posttrain_launch.status.run_facts import read_facts
from ray_runs import wait_until

from posttrain_dist.files import read_rows

STEPS = 20_000


def said(*words: str) -> tuple[int, str]:
    out = io.StringIO()
    with redirect_stdout(out):
        code = main(list(words))
    return code, out.getvalue()


@pytest.fixture(scope="module")
def watched(tiny_llama: Path, rows_file: Path, tmp_path_factory) -> dict:
    """A run that was looked at while it trained, cancelled, and looked at again."""
    root = tmp_path_factory.mktemp("watched")
    command, output = root / "command.py", root / "output"
    command.write_text("import sys\nfrom posttrain_launch.cli import main\nsys.exit(main())\n")
    words = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={root}/out"]
    words += ["data.max_length=128", "train.batch_size=2", "train.dtype=float32"]
    words += [f"train.steps={STEPS}", "logging.wandb=off", "data.eval_fraction=0"]
    process = forkserver.start(command, "train", *words, output=output)
    try:
        wait_until(lambda: len(rows_of(root / "out")) > 5, timeout_s=120)
        (folder,) = (root / "out" / "run").glob("2*")
        seen = {"folder": folder, "root": root / "out", "pid": process.pid}
        seen["running"] = json.loads(said("status", "--root", f"{root}/out", "--json")[1])
        seen["driver"] = find_driver(folder)
        output = root / "followed"
        follower = forkserver.start(command, "logs", str(folder), "-fn1", output=output)
        wait_until(lambda: output.read_text().count("==>") == 2, timeout_s=60)
        seen["cancel"] = said("cancel", str(folder.relative_to(root / "out")), f"--root={root}/out")
        seen["code"] = process.wait(30)
        seen["follower"] = follower.wait(30)
    finally:
        process.kill()
    seen["followed"] = output.read_text()
    seen["after"] = json.loads(said("status", str(folder), "--json")[1])
    return seen


def rows_of(root: Path) -> list[dict]:
    found = list(root.glob("run/2*/metrics.jsonl"))
    return read_rows(found[0]) if found else []


def test_status_of_a_run_that_trains(watched):
    (run,) = watched["running"]["runs"]
    assert run["state"] == "running"
    assert run["run"] == f"run/{watched['folder'].name}"
    assert run["reason"] == f"process {watched['pid']} on {os.uname().nodename}"
    assert watched["driver"].pid == watched["pid"]
    rows = {row["step"]: row for row in read_rows(watched["folder"] / "metrics.jsonl")}
    row = rows[run["step"]]
    assert run["total_steps"] == STEPS
    assert run["loss"] == row["train/loss"]
    assert run["tokens_per_s"] == row["train/tokens_per_s"]
    # The time left is that of the steps left, at the pace of the newest twenty.
    first = rows[max(min(rows), run["step"] - 19)]
    pace = (row["time_s"] - first["time_s"]) / (row["step"] - first["step"])
    assert run["run_left_s"] == pytest.approx((STEPS - run["step"]) * pace)


def test_cancel_saves_and_the_run_can_go_on(watched):
    code, text = watched["cancel"]
    assert (code, watched["code"]) == (0, 130)
    assert f"process {watched['pid']} saves and ends" in text
    stopped = json.loads((watched["folder"] / "logs" / "outcome.json").read_text())
    assert stopped["outcome"] == "stopped"
    assert (watched["folder"] / "checkpoints" / f"step-{stopped['step']:06d}").is_dir()
    assert f"saved at step {stopped['step']}" in text
    (run,) = watched["after"]["runs"]
    assert (run["state"], run["step"]) == ("saved", stopped["step"])
    assert run["run_left_s"] is None
    assert find_driver(watched["folder"]) is None


def test_a_run_that_has_ended_is_not_stopped_again(watched):
    code, text = said("cancel", str(watched["folder"]))
    assert (code, text.split(": ", 1)[1]) == (0, "nothing to stop, it is saved\n")


def test_a_lock_without_its_process_is_nobodys(watched, tmp_path):
    """A pid that is used again by another program is not taken for the driver."""
    lock = tmp_path / "logs" / "driver.lock"
    lock.parent.mkdir()
    lock.write_text(f"{os.getpid()} {os.uname().nodename}\n")
    assert find_driver(tmp_path) is None
    with lock.open("a"):
        assert find_driver(tmp_path).pid == os.getpid()


def test_only_the_end_of_metrics_is_read(tmp_path):
    """A file with a hole of 200 GB, which no memory takes, and rows behind it."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.touch()
    os.truncate(metrics, 200 * 2**30)
    with metrics.open("a") as stream:
        stream.write("\n")
        for step in range(30):
            row = {"step": step, "train/loss": 1.0, "time_s": 0.5 * step}
            stream.write(json.dumps(row) + "\n")
        stream.write('{"step": 30, "train/lo')  # just being written
    facts = read_facts(tmp_path)
    assert (facts.step, facts.step_s) == (29, 0.5)


def test_logs_say_which_file_each_part_is_of(watched):
    folder = watched["folder"]
    code, text = said("logs", str(folder), "--lines", "3")
    assert code == 0
    heads = [line for line in text.splitlines() if line.startswith("==>")]
    assert heads == [
        f"==> rank 0: {folder}/logs/rank-0.log",
        f"==> driver: {folder}/logs/driver.log",
    ]
    last = (folder / "logs" / "driver.log").read_text().splitlines()[-3:]
    assert text.rstrip().splitlines()[-3:] == last
    assert said("logs", str(folder), "--rank", "0", "-n1")[1].splitlines()[0] == heads[0]


def test_logs_are_followed_to_the_end_of_the_run(watched):
    assert watched["follower"] == 0
    (line,) = [
        line for line in watched["followed"].splitlines() if line.startswith("saved and left")
    ]
    assert line in (watched["folder"] / "logs" / "driver.log").read_text().splitlines()
