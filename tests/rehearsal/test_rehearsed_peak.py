"""What a rehearsal is for: no step of the run takes more memory than it did."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from posttrain_dist import train as training
from posttrain_dist.config import (
    CheckpointConfig,
    DataConfig,
    Dtype,
    Full,
    Lora,
    ModelConfig,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.engine import AdamW
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.rehearsal.rehearse import Rehearsal


@pytest.fixture
def counter(monkeypatch):
    """Of the bytes of all tensors that are alive; told which part of a training is which."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import measured_memory

    counter = measured_memory.StorageCounter()
    whole_run, whole_fit = Rehearsal.run, training.fit

    def run(self, *arguments):
        with counter.phase("rehearsal"):
            whole_run(self, *arguments)

    def fit(**arguments):
        with counter.phase("steps"):
            yield from whole_fit(**arguments)

    monkeypatch.setattr(Rehearsal, "run", run)
    monkeypatch.setattr(training, "fit", fit)
    yield counter
    sys.modules.pop("measured_memory", None)


@pytest.mark.parametrize(
    ("tuning", "dtype", "batch_size"),
    [
        (Full(), Dtype.float32, 4),  # moments stand beside what backward takes
        pytest.param(Full(), Dtype.float32, 2, marks=pytest.mark.slow),  # no accumulation
        pytest.param(Full(), Dtype.bfloat16, 4, marks=pytest.mark.slow),
        pytest.param(Lora(rank=16), Dtype.float32, 4, marks=pytest.mark.slow),
    ],
)
def test_no_step_takes_more_than_the_rehearsal(
    tuning, dtype, batch_size, counter, tiny_llama, rows_file, tmp_path
):
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            tuning=tuning,
            optimizer=AdamW(lr=1e-3),
            train=TrainConfig(
                steps=6, batch_size=batch_size, micro_batch_size=2, dtype=dtype, rehearse=True
            ),
            checkpoint=CheckpointConfig(export=False),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    prepare(config, tmp_path / "prepared")
    with counter:
        training.train(config, tmp_path)
    rehearsed, stepped = counter.peaks["rehearsal"], counter.peaks["steps"]
    # The loop makes the next batch meanwhile: some bytes for each token.
    assert stepped <= 1.01 * rehearsed
    assert rehearsed <= 1.1 * stepped, "and is not far above it"
