"""W&B offline: what its own file holds is what metrics.jsonl holds; one run over a restart.

And no fault of W&B reaches the training: servers that refuse, say nothing or answer with errors,
a folder or name that W&B cannot use. The servers are real ones, on the loopback.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from made_plans import FITS, TIGHT

from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.errors import ConfigError
from posttrain_dist.files import read_rows
from posttrain_dist.logs import NOTICES
from posttrain_dist.metrics import LoggingConfig, WandbMode, wandb_mirror
from posttrain_dist.metrics.wandb_sink import WandbSink, resolve_mode
from posttrain_dist.planner.plan import Choice, Tried
from posttrain_dist.planner.plan_file import plan_entry, write_plan
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train

BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(data: bytes):
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no header fits into the rest of this block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def read_wandb(path):
    """(history rows, run record) of a .wandb file, by W&B's own message types."""
    from wandb.proto import wandb_internal_pb2

    rows, run = [], None
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            keys = [item.key or "/".join(item.nested_key) for item in items]
            rows.append(dict(zip(keys, (json.loads(i.value_json) for i in items), strict=True)))
        elif record.WhichOneof("record_type") == "run":
            run = record.run
    return rows, run


def test_wandb_mirrors_metrics_jsonl_and_survives_a_restart(tiny_llama, rows_file, tmp_path):
    config = complete(
        RunConfig(
            name="mirror",
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            train=TrainConfig(steps=4, batch_size=2, save_every=2),
            logging=LoggingConfig(wandb=WandbMode.offline, project="tests"),
        )
    )
    folder = tmp_path / "run"
    prepare(config, folder / "prepared")
    taken = Tried("LoRA", FITS)
    choice = Choice((Tried("full", TIGHT), taken), taken)
    write_plan(folder, choice)
    plan = plan_entry(choice)
    (folder / "run.json").write_text(json.dumps({"wandb_id": "abc123", "plan": plan}))
    short = replace(config, train=replace(config.train, steps=2))
    train(short, folder)
    (first,) = (folder / "wandb").glob("offline-run-*")
    first_file = next(first.glob("*.wandb"))
    first_file.write_bytes(first_file.read_bytes()[:7])  # what a kill can leave

    train(config, folder)
    (second,) = (folder / "wandb").glob("offline-run-*")
    assert second.name.endswith("abc123")
    assert (folder / "wandb" / "superseded" / first.name).is_dir()
    expected = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in expected] == [0, 1, 2, 3, 4]
    rows, run = read_wandb(next(second.glob("*.wandb")))
    assert (run.run_id, run.project) == ("abc123", "tests")
    logged = {i.key: json.loads(i.value_json) for i in run.config.update}
    assert logged["train"]["steps"] == 4 and logged["lineage"]["wandb_id"] == "abc123"
    assert logged["lineage"]["plan"] == plan
    assert plan["chosen"] == "LoRA" and "missing" in plan["reasons"][0]
    log = (folder / "logs" / "rank-0.log").read_text()
    assert "planned: LoRA; 65.000 GiB" in log and f"planned: not {plan['reasons'][0]}" in log
    ours = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    assert ours == expected


def test_online_without_a_key_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE")
    assert resolve_mode(WandbMode.auto) == "offline"
    with pytest.raises(ConfigError, match="there is no W&B key"):
        resolve_mode(WandbMode.online)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert resolve_mode(WandbMode.auto) == "online"


@pytest.mark.parametrize(
    ("named", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "off")]
)
def test_wandbs_own_switch_is_followed(named, mode, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", named)
    assert resolve_mode(WandbMode.auto) == mode
    assert resolve_mode(WandbMode.online) == "online"  # ours goes before it


def test_an_unknown_wandb_mode_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "foo")
    with pytest.raises(ConfigError) as caught:
        resolve_mode(WandbMode.auto)
    assert str(caught.value) == (
        "logging.wandb: WANDB_MODE is foo, which W&B does not know\n"
        "  fix: set WANDB_MODE to online, offline or disabled, or unset it, or set logging.wandb"
    )
    assert resolve_mode(WandbMode.offline) == "offline"


# ---------------------------------------------------------------------------------- faults


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def refusing_server() -> Iterator[str]:
    """Its port is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


class Server(ThreadingHTTPServer):
    """Answers each request with `status` and `answer`; keeps the bodies that it got."""

    daemon_threads = True

    def __init__(self, status: int, answer: object) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.answer = status, json.dumps(answer).encode()
        self.bodies: list[str] = []


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.server.bodies.append(self.rfile.read(length).decode())
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.answer)))
        self.end_headers()
        self.wfile.write(self.server.answer)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def server(status: int, answer: object) -> Iterator[tuple[str, Server]]:
    with Server(status, answer) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}", serving
        serving.shutdown()


# Enough of W&B's protocol for a run to be online.
ONLINE = {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}}


@pytest.fixture
def key(monkeypatch, tmp_path):
    """A key, so that `auto` is online; and a folder for temporary files that can be looked into."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return monkeypatch


def mirror(folder: Path, num_rows: int, project: str = "tests") -> list[dict]:
    """Have W&B mirror a run of some rows, as rank 0 does; the rows."""
    (folder / "logs").mkdir(parents=True)
    config = LoggingConfig(project=project)
    mode = resolve_mode(config.wandb)
    rows = [{"step": i, "train/loss": i / 4} for i in range(num_rows)]
    text = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(text[:2]))
    sink = WandbSink(
        config, folder, mode=mode, run_id="abc", name="n", start_step=0, details={"a": 1}
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(text[2:])
    sink.close()
    return rows


def notices(folder: Path) -> list[str]:
    path = folder / NOTICES
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def offline_rows(folder: Path) -> tuple[Path, list[dict]]:
    (run,) = (folder / "wandb").glob("offline-run-*")
    rows, _ = read_wandb(next(run.glob("*.wandb")))
    return run, [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


def check_offline(folder: Path, rows: list[dict], reason: str) -> None:
    run, kept = offline_rows(folder)
    assert kept == rows
    send = f"the run is kept offline, send it later with: wandb sync {run}"
    (line,) = notices(folder)
    assert line == f"W&B is not online ({reason}); {send}"
    assert list((folder.parent / "tmp").iterdir()) == []  # no folder of W&B's or ours is left


def test_a_silent_server_costs_the_training_nothing(tiny_llama, rows_file, tmp_path, key):
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            train=TrainConfig(steps=3, batch_size=1),
        )
    )
    folder = tmp_path / "run"
    prepare(config, folder / "prepared")
    with silent_server() as url:
        key.setenv("WANDB_BASE_URL", url)
        train(config, folder)
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    check_offline(folder, rows, f"{url} does not answer within 5 s")
    assert json.loads((folder / "logs" / "outcome.json").read_text())["outcome"] == "completed"


def test_a_server_that_breaks_wandb_leaves_the_run_whole_and_offline(tmp_path, key):
    with server(200, {}) as (url, serving):  # W&B's service trips over such an answer
        key.setenv("WANDB_BASE_URL", url)
        rows = mirror(tmp_path / "run", 5)
    assert any("UpsertBucket" in body for body in serving.bodies)
    run, kept = offline_rows(tmp_path / "run")
    assert kept == rows
    assert notices(tmp_path / "run")[0].endswith(f"wandb sync {run}")
    # One folder to send: what the server may have in part is aside.
    assert list((tmp_path / "run" / "wandb").glob("run-*")) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_wandb_itself_refuses_is_one_line(tmp_path, key):
    key.setenv("WANDB_MODE", "offline")
    mirror(tmp_path / "name", 3, project="a/b")
    (line,) = notices(tmp_path / "name")
    assert line.startswith("W&B is off: Invalid project name 'a/b'")
    assert line.endswith("; metrics.jsonl has every number")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "wandb").write_text("no folder")
    mirror(tmp_path / "folder", 3)
    (line,) = notices(tmp_path / "folder")
    assert line.startswith(f"W&B is off: {tmp_path}/folder/wandb")
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_server_that_refuses(tmp_path, key):
    with refusing_server() as url:
        key.setenv("WANDB_BASE_URL", url)
        rows = mirror(tmp_path / "run", 4)
    check_offline(tmp_path / "run", rows, f"{url} cannot be reached: Connection refused")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "reason"), [(500, "{url} answers with error 500"), (401, "no such key")]
)
def test_a_server_that_answers_errors(status, reason, tmp_path, key):
    with server(status, {"errors": [{"message": "no such key"}]}) as (url, _):
        key.setenv("WANDB_BASE_URL", url)
        rows = mirror(tmp_path / "run", 4)
    check_offline(tmp_path / "run", rows, reason.format(url=url))


@pytest.mark.slow
def test_a_healthy_server_gets_every_row(tmp_path, key):
    with server(200, ONLINE) as (url, serving):
        key.setenv("WANDB_BASE_URL", url)
        rows = mirror(tmp_path / "run", 6)
    sent: list[str] = []
    for body in serving.bodies:
        if body.startswith('{"files"') or '"wandb-history.jsonl"' in body:
            history = json.loads(body)["files"].get("wandb-history.jsonl", {"content": []})
            sent += history["content"]
    assert [json.loads(line)["step"] for line in sent] == [row["step"] for row in rows]
    assert not (tmp_path / "run" / NOTICES).exists()


@pytest.mark.slow
def test_a_server_that_dies_while_we_train_ends_nothing(tmp_path, key):
    with server(200, ONLINE) as (url, serving):
        key.setenv("WANDB_BASE_URL", url)
        folder = tmp_path / "run"
        (folder / "logs").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 0, "a": 1.5}\n')
        sink = WandbSink(
            LoggingConfig(),
            folder,
            mode="online",
            run_id="abc",
            name="n",
            start_step=0,
            details={},
        )
        deadline = time.monotonic() + 60
        while not any("wandb-summary" in body for body in serving.bodies):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "a": 2.5}\n')
    sink.close()
    (run,) = (folder / "wandb").glob("run-*")
    rows, _ = read_wandb(next(run.glob("*.wandb")))
    assert [row["step"] for row in rows] == [0, 1]
    assert notices(folder) == [f"W&B did not take everything; send the rest: wandb sync {run}"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_resumed_run_sends_what_the_server_does_not_have(tmp_path):
    """Its history has one step for each row: two of the three before step 2 came through."""

    class Run:  # a server that has had a run before is not to be had here
        starting_step = 2
        log = staticmethod(lambda row: sent.append(row["step"]))

    sent: list[int] = []
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(5)))
    ended = threading.Event()
    ended.set()
    wandb_mirror._follow(Run, tmp_path, {"start_step": 2}, ended)
    assert sent == [2, 3, 4]


@pytest.mark.slow
def test_a_training_that_is_killed_leaves_a_whole_mirror(tmp_path, key):
    key.setenv("WANDB_MODE", "offline")
    script = """
import json, os, sys
from pathlib import Path
from posttrain_dist.metrics import LoggingConfig
from posttrain_dist.metrics.wandb_sink import WandbSink
folder = Path(sys.argv[1])
(folder / "logs").mkdir(parents=True)
(folder / "metrics.jsonl").write_text('{"step": 0, "a": 1.5}\\n{"step": 1, "a": 2.5}\\n')
sink = WandbSink(
    LoggingConfig(), folder, mode="offline", run_id="abc", name="n", start_step=0, details={}
)
os.kill(os.getpid(), 9)
"""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", script, str(folder)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not (folder / "wandb").is_dir() or list((tmp_path / "tmp").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert offline_rows(folder)[1] == [{"step": 0, "a": 1.5}, {"step": 1, "a": 2.5}]
