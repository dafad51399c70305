"""Small trainings on pairs of answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from posttrain_dist.config import (
    CheckpointConfig,
    DataConfig,
    Dtype,
    ModelConfig,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.engine import AdamW
from posttrain_dist.files import read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train


def write_pairs(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Rows with a prompt, the word in it chosen, and another of its length or longer rejected."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        word, other = ("".join(draw.choices("abcdefgh", k=draw.randint(1, 9))) for _ in range(2))
        row = {"prompt": f"copy {word} {i}", "chosen": word, "rejected": f"{other}z"}
        rows.append({**row, "task_type": ("copy", "echo")[i % 2]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs_config(folder: Path, rows: Path, objective: Any, **groups: Any) -> RunConfig:
    """Four steps in float32; `groups` are those of RunConfig, `train` keywords of its own."""
    steps = {"steps": 4, "batch_size": 2, "dtype": Dtype.float32, **groups.pop("train", {})}
    values: dict[str, Any] = {
        "model": ModelConfig(path=str(folder)),
        "data": DataConfig(
            train=str(rows),
            max_length=96,
            eval_fraction=0.25,
            cache=str(rows.parent / "cache"),
            convert_pairs=objective.rows == "labels",
        ),
        "optimizer": AdamW(lr=1e-2, warmup_ratio=0.0),
        "train": TrainConfig(**steps),
        "checkpoint": CheckpointConfig(export=False),
        "logging": LoggingConfig(wandb=WandbMode.off),
        **groups,
    }
    return complete(RunConfig(objective=objective, **values))


def trained(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run, which goes on if it is there."""
    prepare(config, folder / "prepared")
    train(config, folder)
    return read_rows(folder / "metrics.jsonl")


def losses(rows: list[dict[str, Any]]) -> list[float]:
    """The loss of each update."""
    return [row["train/loss"] for row in rows if row["step"]]


def notices(folder: Path) -> list[str]:
    """What a run told whoever watches it."""
    return [row["text"] for row in read_rows(folder / "logs" / "notices.jsonl")]
