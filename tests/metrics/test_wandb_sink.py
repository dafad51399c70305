"""W&B offline: what its own file holds is what metrics.jsonl holds; one run over a restart."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest

from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.errors import ConfigError
from posttrain_dist.files import read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.metrics.wandb_sink import resolve_mode
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
    (folder / "run.json").write_text(json.dumps({"wandb_id": "abc123"}))
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
