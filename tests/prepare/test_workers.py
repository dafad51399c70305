"""Several processes prepare the same bytes as one; a bad row, a dead process and a full cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import forkserver
import pytest

from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, complete
from posttrain_dist.data import LongRows, OnBadRow, Template
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.errors import DataError, PosttrainError
from posttrain_dist.prepare import build_dataset as build
from posttrain_dist.prepare import prepare
from posttrain_dist.prepare.data_report import data_report
from posttrain_dist.prepare.processes import workers
from posttrain_dist.report.data.data_figures import cards_of
from posttrain_dist.report.data.data_text import counts_text, data_text


def config_of(model: Path, tmp_path: Path, **data: Any) -> RunConfig:
    values = {"max_length": 64, "cache": str(tmp_path / "cache"), **data}
    return complete(RunConfig(model=ModelConfig(path=str(model)), data=DataConfig(**values)))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start processes for data of any size, and give them a few rows at once."""
    monkeypatch.setattr(build, "SMALL_BYTES", 1)
    monkeypatch.setattr(build, "UNIT_BYTES", 700)


def test_two_processes_give_the_same_bytes_as_one(
    builders: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = builders.write(tmp_path / "rows" / "a.jsonl", builders.rows(40))
    builders.write(tmp_path / "rows" / "b.jsonl", builders.rows(40, seed=1))
    with first.open("a") as file:  # found by whichever process reads it
        file.write('{"messages": []}\n')
    values = {"train": str(first.parent), "eval_fraction": 0.2, "on_bad_row": OnBadRow.skip}
    one = config_of(tiny_llama, tmp_path, **values, workers=1)
    prepare(one, tmp_path / "one")
    monkeypatch.setattr(build, "SMALL_BYTES", 1)
    monkeypatch.setattr(build, "UNIT_BYTES", 700)
    two = config_of(tiny_llama, tmp_path, **values | {"cache": str(tmp_path / "c2")}, workers=2)
    seen: list[tuple[int, int]] = []
    summary = prepare(two, tmp_path / "two", progress=lambda *at: seen.append(at))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert summary.rejected == 1
    assert len(seen) > 10 and seen[-1] == (len(seen), len(seen))
    found = json.loads((tmp_path / "two" / "findings.json").read_text())
    assert [(row["file"], row["line"]) for row in found["rejected"]] == [(str(first), 41)]


@pytest.mark.usefixtures("many")
def test_bad_rows_of_several_processes_come_in_order(
    builders: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    data = builders.write(tmp_path / "rows.jsonl", builders.rows(60))
    lines = data.read_text().splitlines()
    lines[10], lines[50] = "{", '{"messages": "x"}'
    data.write_text("\n".join(lines))
    with pytest.raises(PosttrainError) as caught:
        prepare(config_of(tiny_llama, tmp_path, train=str(data), workers=2), tmp_path / "p")
    told = str(caught.value)
    assert -1 < told.find(f"{data}:11 ") < told.find(f"{data}:51 ")
    assert not (tmp_path / "p").exists() and not list((tmp_path / "cache").glob("*/*"))


def test_rows_that_are_skipped_are_counted_and_shown(
    builders: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    data = builders.write(tmp_path / "rows.jsonl", builders.rows(9))
    with data.open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "q"}]}\n')
    config = config_of(tiny_llama, tmp_path, train=str(data), eval_fraction=0)
    with pytest.raises(DataError, match=r"rows\.jsonl:10 .*no assistant turn"):
        prepare(config, tmp_path / "p")
    config.data.on_bad_row = OnBadRow.skip
    summary = prepare(config, tmp_path / "p")
    assert summary.rejected == 1 and sum(c.rows for c in summary.splits["train"].values()) == 9
    data.write_text(data.read_text().splitlines()[-1])
    with pytest.raises(DataError, match="no assistant turn"):  # nothing is left
        prepare(config, tmp_path / "q")


def test_rows_of_weight_0_are_left_out_and_counted(
    builders: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    rows = builders.rows(9)
    data = builders.write(tmp_path / "rows.jsonl", rows)
    prepare(config_of(tiny_llama, tmp_path, train=str(data)), tmp_path / "without")
    off = [builders.chat("off", "off", "off") | said for said in ({"train": False}, {"weight": 0})]
    builders.write(data, [off[0], *rows[:5], off[1], off[1], *rows[5:]])
    config = config_of(tiny_llama, tmp_path, train=str(data))
    summary = prepare(config, tmp_path / "p")
    assert summary.channels == ["copy", "reverse", "upper"] and summary.rejected == 0
    # They change nothing else: not even which rows are held out.
    arrays = [
        {name: sha for name, sha in digests(tmp_path / folder).items() if name.endswith(".npy")}
        for folder in ("without", "p")
    ]
    assert arrays[0] == arrays[1] and "eval.npy" in arrays[0] and len(arrays[0]) > 4
    report = data_report(config, tmp_path / "p")
    counts = {name: report["files"][0][name] for name in ("rows", "rejected", "left_out")}
    assert counts == {"rows": 9, "rejected": 0, "left_out": 3}
    assert "3 rows have the weight 0: left out" in counts_text(report)
    assert "3 rows have the weight 0: left out" in data_text(report, 100, False, conversations=0)
    (card,) = (card for card in cards_of(report) if card.label == "Rejected rows")
    assert (card.value, card.sub) == ("0", "in 1 file; 3 of weight 0 left out")
    builders.write(data, off)
    with pytest.raises(DataError, match="every row has the weight 0") as caught:
        prepare(config, tmp_path / "q")
    assert caught.value.where == str(data)


def test_a_process_that_dies_is_an_error_and_leaves_nothing(
    builders: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SMALL_BYTES", 1)
    monkeypatch.setattr(build, "UNIT_BYTES", 700)
    data = builders.write(tmp_path / "rows.jsonl", builders.rows(2000))
    started: list[subprocess.Popen[bytes]] = []
    plain = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(plain(*args, **kwargs))
        killer.start()
        return started[-1]

    def kill_one() -> None:
        children = Path(f"/proc/{started[0].pid}/task/{started[0].pid}/children")
        while len(workers_of := children.read_text().split()) < 2:
            time.sleep(0.01)
        os.kill(int(workers_of[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    monkeypatch.setattr(workers.subprocess, "Popen", start)
    with pytest.raises(RuntimeError, match=r"a process that tokenises died \(exit code -9\)"):
        prepare(config_of(tiny_llama, tmp_path, train=str(data), workers=2), tmp_path / "p")
    assert len(started) == 1 and started[0].poll() == 128 + signal.SIGKILL
    assert not (tmp_path / "p").exists()


def test_two_runs_at_once_prepare_once(builders: Any, tiny_llama: Path, tmp_path: Path) -> None:
    data = builders.write(tmp_path / "rows.jsonl", builders.rows(60))
    script = textwrap.dedent(f"""
        import sys
        from posttrain_dist.config import *
        from posttrain_dist.prepare import prepare
        from posttrain_dist.prepare import build_dataset as module
        build = module.build_dataset
        def counted(*args):
            print("built", flush=True)
            build(*args)
        module.build_dataset = counted
        data = DataConfig(train={str(data)!r}, max_length=64, cache={str(tmp_path / "c")!r})
        config = complete(RunConfig(model=ModelConfig(path={str(tiny_llama)!r}), data=data))
        from pathlib import Path
        prepare(config, Path(sys.argv[1]))
    """)
    (tmp_path / "script.py").write_text(script)
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    running = [
        forkserver.start(tmp_path / "script.py", str(tmp_path / log.stem), output=log)
        for log in logs
    ]
    assert [child.wait(120) for child in running] == [0, 0]
    assert sorted(log.read_text().count("built\n") for log in logs) == [0, 1]
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_killed_preparation_leaves_no_half_cache(
    builders: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    data = builders.write(tmp_path / "rows.jsonl", builders.rows(60))
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from posttrain_dist.config import *
        from posttrain_dist.prepare import prepare
        from posttrain_dist.prepare import build_dataset as build
        build.findings = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        data = DataConfig(train={str(data)!r}, max_length=64, cache={str(tmp_path / "cache")!r})
        config = complete(RunConfig(model=ModelConfig(path={str(tiny_llama)!r}), data=data))
        prepare(config, Path({str(tmp_path / "p")!r}))
    """)
    (tmp_path / "script.py").write_text(script)
    died = forkserver.start(tmp_path / "script.py", output=tmp_path / "log")
    assert died.wait(120) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (tmp_path / "p").exists()
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [".partial"]
    config = config_of(tiny_llama, tmp_path, train=str(data))
    prepare(config, tmp_path / "p")
    prepare(dataclasses.replace(config, name="other"), tmp_path / "q")
    assert digests(tmp_path / "p") == digests(tmp_path / "q")
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_without_a_cache_that_can_be_written_the_run_folder_is_used(
    builders: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    data = builders.write(tmp_path / "rows.jsonl", builders.rows(9))
    (tmp_path / "file").write_text("in the way")
    config = config_of(tiny_llama, tmp_path, train=str(data), cache=str(tmp_path / "file" / "c"))
    prepare(config, tmp_path / "p")
    assert len(Examples.open(tmp_path / "p", "train")) > 0


def test_long_rows_are_split_or_dropped(builders: Any, tiny_llama: Path, tmp_path: Path) -> None:
    rows = [builders.chat("q", "abcdefghij" * 3, "t"), builders.chat("q", "short", "t")]
    data = builders.write(tmp_path / "rows.jsonl", rows)
    found = {}
    for policy in (LongRows.split, LongRows.drop):
        config = config_of(
            tiny_llama,
            tmp_path,
            train=str(data),
            max_length=20,
            eval_fraction=0,
            long_rows=policy,
        )
        config.template = Template(strict=False)
        summary = prepare(config, tmp_path / policy.name)
        counts = summary.splits["train"]["t"]
        assert counts.rows == 2
        found[policy] = (counts.samples, counts.dropped, counts.supervised)
    assert found[LongRows.split] == (3, 0, 31 + 6)  # every target once
    assert found[LongRows.drop] == (1, 1, 6)


def test_the_time_of_a_second_call_is_that_of_reading_the_files(
    builders: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """No row is parsed and no token made: the tokenizer is asked for nothing."""
    data = builders.write(tmp_path / "rows.jsonl", builders.rows(30))
    config = config_of(tiny_llama, tmp_path, train=str(data))
    prepare(config, tmp_path / "p")
    kept = {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*.npy")}
    began = time.time()
    prepare(config, tmp_path / "q")
    assert {path.stat().st_ino for path in (tmp_path / "q").rglob("*.npy")} == set(kept.values())
    assert all(path.stat().st_mtime < began for path in (tmp_path / "q").rglob("*.npy"))


def test_processes_end_with_the_one_that_started_them(
    builders: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    data = builders.write(tmp_path / "rows.jsonl", builders.rows(20000))
    script = textwrap.dedent(f"""
        from posttrain_dist.config import *
        from posttrain_dist.prepare import prepare_cached
        from posttrain_dist.prepare import build_dataset as build
        from posttrain_dist.prepare.processes import workers
        build.SMALL_BYTES, build.UNIT_BYTES = 1, 700
        plain = workers.subprocess.Popen
        def start(*args, **kwargs):
            server = plain(*args, **kwargs)
            print(server.pid, flush=True)
            return server
        workers.subprocess.Popen = start
        data = DataConfig(train={str(data)!r}, max_length=64, workers=2, cache={str(tmp_path)!r})
        model = ModelConfig(path={str(tiny_llama)!r})
        prepare_cached(complete(RunConfig(model=model, data=data)))
    """)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    ends = time.monotonic() + 60
    while len(children := children_of(server)) < 2 and time.monotonic() < ends:
        time.sleep(0.01)
    assert len(children) == 2
    threads = [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in (server, *children)]
    assert threads == [1, 1, 1]  # nothing that a fork could have lost
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    while any(map(is_alive, (server, *children))) and time.monotonic() < ends:
        time.sleep(0.01)
    assert not [pid for pid in (server, *children) if is_alive(pid)]


def children_of(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    """Whether it runs: in a container nobody may wait for an orphan that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
