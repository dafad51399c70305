"""Every tuning in every layout: the losses of one process, and a resume that changes nothing."""

from __future__ import annotations

import pytest
import torch

from posttrain_dist.checkpoint import store
from posttrain_dist.checkpoint.manifest import MANIFEST
from posttrain_dist.checkpoint.trained_state import read_kept
from posttrain_dist.config import (
    Bottleneck,
    CheckpointConfig,
    DataConfig,
    Dtype,
    Full,
    Ia3,
    Lora,
    ModelConfig,
    Prefix,
    Prompt,
    PTuning,
    Quantize,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.engine import AdamW, DeepSpeed, Single
from posttrain_dist.files import read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train
from posttrain_dist.tuning.lora import LoraInit

STEPS, SAVED = 4, 2
QLORA = Lora(rank=4, quantize=Quantize.nf4)
TUNINGS = {
    "lora": Lora(rank=4),
    "lora_plus": Lora(rank=4, lr_ratio_b=4.0, rslora=True),
    "lora_fa": Lora(rank=4, freeze_a=True),
    "pissa": Lora(rank=4, init=LoraInit.pissa),
    "dora": Lora(rank=4, dora=True),
    "lora_in_full": Lora(rank=4, modules_to_save=["model.norm", "embed_tokens"]),
    "ia3": Ia3(),
    "bottleneck": Bottleneck(reduction=4),
    "ensemble": Prompt(tokens=2, ensemble=2),
    "prompt": Prompt(tokens=3),
    "p_tuning": PTuning(tokens=3),
    "prefix": Prefix(tokens=3),
    "part": Full(train=r".*(norm|q_proj).*"),
}


def config_of(name, engine, tiny_llama, rows_file, dtype=Dtype.float32):
    # Clipping is on and bites, weight decay too: both must agree between engines.
    rate = 3e-3 if name in ("part", "p_tuning") else 1e-2
    return complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            tuning=QLORA if name == "qlora" else TUNINGS[name],
            engine=engine,
            optimizer=AdamW(lr=rate, clip=0.5, weight_decay=0.1),
            train=TrainConfig(
                steps=STEPS, batch_size=4, micro_batch_size=1, save_every=SAVED, dtype=dtype
            ),
            checkpoint=CheckpointConfig(export=False),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )


def zero(stage):
    return DeepSpeed(stage=stage, persistence_threshold=40)


def freeze(root, name, config):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    prepare(config, folder / "prepared")
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


def lose_the_end(folder):
    (store.folder_of(folder, STEPS) / MANIFEST).unlink()
    (folder / "logs" / "outcome.json").unlink()


def numbers(folder):
    outside = ("time_s", "system/memory_bytes", "train/tokens_per_s")
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in outside} for row in rows]


def losses(folder):
    return [row["train/loss"] for row in numbers(folder) if row["step"]]


def check(names, stage, world, root, tiny_llama, rows_file, run_workers, dtype=Dtype.float32):
    """Train in one process and under ZeRO, resume under ZeRO, and go on from there in one."""
    make = lambda name, engine: config_of(name, engine, tiny_llama, rows_file, dtype)  # noqa: E731
    single, sharded = {}, {}
    for name in names:
        single[name] = freeze(root / "single", name, make(name, Single()))
        train(make(name, Single()), single[name])
        sharded[name] = freeze(root / "sharded", name, make(name, zero(stage)))
    run_workers("train_runs.py", world, *sharded.values())
    whole = {name: numbers(folder) for name, folder in sharded.items()}
    first = {n: losses(folder)[:SAVED] for n, folder in single.items()}
    if dtype is Dtype.float32:
        for name, folder in sharded.items():
            assert losses(folder) == pytest.approx(losses(single[name]), rel=1e-6), name
    for folder in sharded.values():
        lose_the_end(folder)
    run_workers("train_runs.py", world, *sharded.values())
    for name, folder in sharded.items():
        assert numbers(folder) == whole[name], name
        if name == "part":
            continue
        lose_the_end(folder)
        reference = losses(single[name])
        train(make(name, Single()), folder)
        assert losses(folder)[:SAVED] == [row["train/loss"] for row in whole[name][1 : SAVED + 1]]
        tolerance = 1e-6 if dtype is Dtype.float32 else 3e-2
        assert losses(folder) == pytest.approx(reference, rel=tolerance), name
        ours, theirs = (
            read_kept(store.folder_of(each, STEPS) / "state") for each in (folder, single[name])
        )
        if dtype is Dtype.float32:
            for tensor in ours:
                torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=1e-3, atol=2e-5)
    return first


def test_lora_under_zero3_on_two_ranks(tmp_path, tiny_llama, rows_file, run_workers):
    check(["lora"], 3, 2, tmp_path, tiny_llama, rows_file, run_workers)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_every_tuning(tmp_path, tiny_llama, rows_file, run_workers, stage, world):
    first = check(TUNINGS, stage, world, tmp_path, tiny_llama, rows_file, run_workers)
    assert len({tuple(each) for each in first.values()}) > len(TUNINGS) // 2  # they differ


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_qlora(tmp_path, builders, rows_file, run_workers, stage):
    """The base in NF4 is in no checkpoint, and none is read for it."""
    size = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    llama = builders.model(tmp_path / "model", **size)
    check(["qlora"], stage, 2, tmp_path, llama, rows_file, run_workers)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_every_tuning_in_bfloat16(tmp_path, tiny_llama, rows_file, run_workers, stage):
    check(TUNINGS, stage, 2, tmp_path, tiny_llama, rows_file, run_workers, Dtype.bfloat16)
