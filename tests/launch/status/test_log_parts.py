"""Which log comes first, and logs that grow while their run starts again."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from posttrain_launch.status.follow_logs import GrowingLog, follow
from posttrain_launch.status.log_parts import last_lines, log_parts

from posttrain_dist.errors import PosttrainError

TRACE = "Traceback (most recent call last):\n  ...\nRuntimeError: lost\n"


@pytest.fixture
def run(tmp_path) -> Path:
    logs = tmp_path / "logs"
    logs.mkdir()
    for rank in (0, 2, 11):
        (logs / f"rank-{rank}.log").write_text(f"of rank {rank}\n")
    (logs / "driver.log").write_text("driver\n")
    for job in (7, 12):
        (logs / f"slurm-{job}.log").write_text(f"job {job}\n")
        os.utime(logs / f"slurm-{job}.log", (job, job))
    return tmp_path


def names(folder: Path, **more) -> list[str]:
    return [part.path.name for part in log_parts(folder, **more)]


def test_rank_0_comes_first_where_none_failed(run):
    assert names(run) == ["rank-0.log", "driver.log", "slurm-12.log"]
    assert names(run, job="7")[-1] == "slurm-7.log"


def test_the_rank_that_failed_first_comes_first(run):
    for rank, written in ((2, 2000), (11, 1000)):  # rank 2 fails of the loss of rank 11
        path = run / "logs" / f"rank-{rank}.log"
        path.write_text(TRACE)
        os.utime(path, (written, written))
    assert names(run)[0] == "rank-11.log"
    (run / "logs" / "error.json").write_text(json.dumps({"rank": 2}))
    assert names(run)[0] == "rank-2.log"
    (run / "logs" / "error.json").write_text(json.dumps({"rank": None}))
    assert names(run)[0] == "rank-11.log"
    (run / "FINISHED").touch()  # what an earlier start left does not matter any more
    assert names(run)[0] == "rank-0.log"


def test_one_rank(run):
    assert names(run, rank=11) == ["rank-11.log"]
    with pytest.raises(PosttrainError, match=r"no log of rank 3\n  fix: its ranks are 0 to 11"):
        log_parts(run, rank=3)


def test_a_run_without_logs_says_where_to_look(tmp_path):
    with pytest.raises(PosttrainError, match="has no logs yet"):
        log_parts(tmp_path)
    with pytest.raises(PosttrainError, match="without --rank, `posttrain logs"):
        log_parts(tmp_path, rank=0)


def test_the_last_lines_of_a_large_log(run):
    log = run / "logs" / "rank-0.log"
    log.write_text("".join(f"line {i} {'x' * 100}\n" for i in range(100_000)) + "50%\r100% done\n")
    found = last_lines(log, 3)
    assert [line.split(" x")[0] for line in found] == ["line 99998", "line 99999", "100% done"]
    assert len(last_lines(log, 5000)) == 5000
    assert last_lines(run / "logs" / "none.log", 3) == []


def test_a_log_is_followed_over_a_restart(run):
    log = run / "logs" / "driver.log"
    growing = GrowingLog(log)
    assert growing.read() == []
    with log.open("a") as stream:
        stream.write("one\ntw")
        stream.flush()
        assert growing.read() == ["one"]
        stream.write("o\n")
    assert growing.read() == ["two"]
    log.write_text("new\n")  # shorter than what was read: cut, and written again
    assert growing.read() == ["new"]
    log.unlink()
    assert growing.read() == []
    log.write_text("again, and longer than before\n")
    assert growing.read() == ["again, and longer than before"]


def test_following_ends_with_the_run_and_shows_its_last_words(run):
    logs = run / "logs"
    wrote, shown = threading.Event(), []

    def is_live() -> bool:
        if not wrote.is_set():
            with (logs / "driver.log").open("a") as stream:
                stream.write("second start\n")
            (logs / "rank-1.log").write_text("from its first line\nno end yet")
            wrote.set()
            return True
        return False

    def paths() -> list[Path]:
        return sorted([logs / "driver.log", *logs.glob("rank-1.log")])

    follow(paths, lambda path, lines: shown.append((path.name, lines)), is_live, poll_s=0.01)
    assert shown == [
        ("driver.log", ["second start"]),
        ("rank-1.log", ["from its first line"]),
        ("rank-1.log", ["no end yet"]),
    ]
