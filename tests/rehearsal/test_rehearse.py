"""The rehearsal before step 1: it takes what the run takes, and leaves nothing of itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from posttrain_dist.checkpoint import store
from posttrain_dist.config import (
    CheckpointConfig,
    DataConfig,
    Dtype,
    Full,
    Lora,
    ModelConfig,
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

STEPS = 3
# Dropout draws from the generator that a rehearsal must give back.
LORA = Lora(rank=4, dropout=0.3)
ENGINES = {"single": Single()} | {
    f"zero{stage}": DeepSpeed(stage=stage, persistence_threshold=40) for stage in range(4)
}
# name -> engine, tuning, dtype, optimizer
CASES = {
    f"{engine}-{tuning}-{dtype.name}": (engine, method, dtype, {})
    for engine in ENGINES
    for tuning, method in (("full", Full()), ("lora", LORA))
    for dtype in (Dtype.float32, Dtype.bfloat16)
} | {
    "single-8bit": ("single", Full(), Dtype.bfloat16, {"state_bits": 8, "paged": True}),
    "zero2-offload": ("zero2", Full(), Dtype.bfloat16, {}),
    "zero3-offload": ("zero3", Full(), Dtype.bfloat16, {}),
    "single-nf4": ("single", replace(LORA, quantize=Quantize.nf4), Dtype.float32, {}),
    "zero3-nf4": ("zero3", replace(LORA, quantize=Quantize.nf4), Dtype.bfloat16, {}),
}
DEFAULT = (
    "single-lora-bfloat16",
    "single-8bit",
    "zero3-full-float32",
)
each_case = pytest.mark.parametrize(
    "name",
    [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)


def config_of(name, model, rows, **changes) -> RunConfig:
    engine, tuning, dtype, optimizer = CASES[name]
    settings = {"steps": STEPS, "batch_size": 8, "micro_batch_size": 2, "dtype": dtype, **changes}
    return complete(
        RunConfig(
            model=ModelConfig(path=str(model)),
            data=DataConfig(train=str(rows), max_length=64),
            tuning=tuning,
            engine=replace(ENGINES[engine], offload=True) if "offload" in name else ENGINES[engine],
            # A rate and a decay that would show, were they not zero in the rehearsal.
            optimizer=AdamW(lr=1e-2, weight_decay=0.1, clip=0.5, **optimizer),
            train=TrainConfig(**settings),
            checkpoint=CheckpointConfig(export=False),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )


def freeze(folder, config, prepared=None):
    folder.mkdir(parents=True)
    if prepared is None:
        prepare(config, folder / "prepared")
    else:
        (folder / "prepared").symlink_to(prepared)
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, nf4_llama, rows_file, run_workers, request):
    """name -> folders of a run without a rehearsal and with one, of those that are tested."""
    tests = [item for item in request.session.items if item.path == request.path]
    tested = {item.callspec.params["name"] for item in tests if hasattr(item, "callspec")}
    root, first, found = tmp_path_factory.mktemp("rehearsed"), None, {}
    for name in CASES:
        if name not in tested:
            continue
        found[name] = []
        for rehearse in (False, True):
            config = config_of(name, nf4_llama, rows_file, rehearse=rehearse)
            folder = freeze(root / f"{name}-{rehearse}", config, first)
            first = first or folder / "prepared"
            found[name].append(folder)
    for folder in [f for n, pair in found.items() if n.startswith("single") for f in pair]:
        train(RunConfig.from_yaml((folder / "config.yaml").read_text()), folder)
    sharded = [f for n, pair in found.items() if not n.startswith("single") for f in pair]
    if sharded:
        run_workers("train_runs.py", 2, *sharded, timeout_s=550)
    return found


def numbers(folder) -> list[dict]:
    """The rows of metrics.jsonl, without times and memory."""
    measured = ("time_s", "train/tokens_per_s", "system/memory_bytes")
    return [
        {key: value for key, value in row.items() if key not in measured}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def saved(folder) -> Iterator[tuple[str, bytes | str]]:
    """Every number of the last checkpoint, by its place; tensors as their bytes."""

    def walk(value, place):
        if isinstance(value, torch.Tensor):
            yield place, value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        elif isinstance(value, dict):
            for key, each in value.items():
                yield from walk(each, f"{place}/{key}")
        elif isinstance(value, list | tuple):
            for i, each in enumerate(value):
                yield from walk(each, f"{place}/{i}")
        elif hasattr(value, "__dict__"):
            yield from walk(vars(value), f"{place}:{type(value).__name__}")
        else:
            yield place, repr(value)

    whole = store.whole_checkpoints(folder)[-1]
    for file in sorted((whole / store.STATE).rglob("*")):
        if file.suffix == ".safetensors":
            yield from walk(load_file(file), file.name)
        elif file.suffix == ".pt":
            yield from walk(torch.load(file, weights_only=False), file.name)


@each_case
def test_a_rehearsed_run_is_the_same_to_the_last_bit(runs, name):
    plain, rehearsed = runs[name]
    assert "rehearsed the heaviest batch" in (rehearsed / "logs" / "rank-0.log").read_text()
    assert "rehearsed the heaviest batch" not in (plain / "logs" / "rank-0.log").read_text()
    assert len(numbers(plain)) == STEPS + 1
    assert numbers(rehearsed) == numbers(plain)
    assert (rehearsed / "samples.log").read_text() == (plain / "samples.log").read_text()
    # Weights, masters, moments and the engine's counters.
    assert list(saved(rehearsed)) and list(saved(plain)) == list(saved(rehearsed))
    assert not (rehearsed / "rehearsal").exists()
