"""`train.dtype=auto`: what a CPU multiplies fast, decided once for a run."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import posttrain_kernels
import pytest
import torch
from posttrain_kernels.passes import matmuls
from safetensors.torch import load_file

from posttrain_dist import build
from posttrain_dist.build import frozen_dtype, pick_dtype
from posttrain_dist.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def config_of(model: Path, dtype: Dtype = Dtype.auto) -> RunConfig:
    return complete(RunConfig(model=ModelConfig(path=str(model)), train=TrainConfig(dtype=dtype)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """machine(flags, speedup): a CPU with or without the instructions; its calls."""
    asked: list[tuple] = []

    def make(flags: bool, speedup: float) -> list[tuple]:
        def measure(*shape, **options) -> float:
            asked.append((*shape, options))
            return speedup

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(build, "multiplies_fast", lambda _: flags)
        monkeypatch.setattr(build, "product_speedup", measure)
        return asked

    return make


@pytest.mark.parametrize(
    ("flags", "speedup", "wanted"),
    [
        (True, 2.4, BFLOAT16),
        (False, 1.3, BFLOAT16),  # instructions that no list of flags knows
        (True, 0.7, FLOAT32),  # emulated
        (False, 0.01, FLOAT32),
        (True, 0.9, BFLOAT16),  # within a fifth: the flags decide
        (True, 1.1, BFLOAT16),
        (False, 1.1, FLOAT32),
        (False, 0.9, FLOAT32),
    ],
)
def test_a_clear_measurement_decides_else_the_flags(machine, tiny_llama, flags, speedup, wanted):
    asked = machine(flags, speedup)
    assert pick_dtype(Dtype.auto, config_of(tiny_llama)) is wanted
    assert asked == [(BFLOAT16, 32, 48, {"rows": 2048})]  # the model's MLP
    assert pick_dtype(Dtype.float32, config_of(tiny_llama)) is FLOAT32
    assert pick_dtype(Dtype.bfloat16, config_of(tiny_llama)) is BFLOAT16
    assert len(asked) == 1  # what was asked for is not measured


def test_a_run_keeps_what_was_chosen_for_it(machine, tiny_llama, tmp_path):
    (tmp_path / "logs").mkdir()
    asked = machine(True, 2.0)
    assert frozen_dtype(config_of(tiny_llama), tmp_path) is BFLOAT16
    machine(False, 0.01)  # it goes on on another machine
    assert frozen_dtype(config_of(tiny_llama), tmp_path) is BFLOAT16
    assert len(asked) == 1
    assert json.loads((tmp_path / "logs" / "dtype.json").read_text()) == {"dtype": "bfloat16"}
    assert frozen_dtype(config_of(tiny_llama, Dtype.float32), tmp_path) is FLOAT32


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("flags : fpu avx512f avx512_bf16 amx", True),
        ("flags : fpu amx_tile amx_bf16", True),
        ("Features : fp asimd bf16 i8mm", True),
        ("flags : fpu avx2 avx512f", False),
        ("flags : fpu avx512_bf16x", False),
    ],
)
def test_instructions_are_found_by_their_flags(monkeypatch, flags, wanted):
    text = f"processor : 0\nmodel name : amx_bf16\n{flags}\n"
    monkeypatch.setattr(matmuls.Path, "read_text", lambda *_, **__: text)
    matmuls.multiplies_fast.cache_clear()
    try:
        assert matmuls.multiplies_fast(BFLOAT16) is wanted
        assert matmuls.multiplies_fast(FLOAT32)
    finally:
        matmuls.multiplies_fast.cache_clear()


def test_the_measurement_is_one_and_short():
    start = time.perf_counter()
    same = posttrain_kernels.product_speedup(FLOAT32, 512, 1024)
    found = posttrain_kernels.product_speedup(BFLOAT16, 4096, 14_336)
    assert time.perf_counter() - start < 20  # not the minutes of one emulated product
    assert 0.3 < same < 3
    if not matmuls.multiplies_fast(BFLOAT16) and torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert found < 0.5


def test_a_run_trains_in_the_dtype_that_was_chosen(tiny_llama, rows_file, tmp_path):
    config = replace(
        config_of(tiny_llama),
        data=DataConfig(train=str(rows_file), max_length=64, eval_fraction=0),
        train=TrainConfig(steps=1, batch_size=2, micro_batch_size=2),
        logging=LoggingConfig(wandb=WandbMode.off),
    )
    prepare(config, tmp_path / "prepared")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "dtype.json").write_text('{"dtype": "bfloat16"}')
    train(config, tmp_path)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert {weight.dtype for weight in exported.values()} == {BFLOAT16}
