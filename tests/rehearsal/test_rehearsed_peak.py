"""What a rehearsal is for: no step of the run takes more memory than it did."""

from __future__ import annotations

import random
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
    Prefix,
    Prompt,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.engine import AdamW
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.planner.job import DataFacts
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.make_job import make_job
from posttrain_dist.planner.memory.phases import device_phases
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


def measured(config, folder, counter):
    """Bytes of the fullest moment of the rehearsal, and of the steps."""
    prepare(config, folder / "prepared")
    with counter:
        training.train(config, folder)
    return counter.peaks["rehearsal"], counter.peaks["steps"]


def config_of(model, data, tuning, **train):
    return complete(
        RunConfig(
            model=ModelConfig(path=str(model)),
            data=data,
            tuning=tuning,
            optimizer=AdamW(lr=1e-3),
            train=TrainConfig(rehearse=True, **train),
            checkpoint=CheckpointConfig(export=False),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )


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
    data = DataConfig(train=str(rows_file), max_length=64)
    size = {"batch_size": batch_size, "micro_batch_size": 2}
    config = config_of(tiny_llama, data, tuning, steps=6, dtype=dtype, **size)
    rehearsed, stepped = measured(config, tmp_path, counter)
    # The loop makes the next batch meanwhile: some bytes for each token.
    assert stepped <= 1.01 * rehearsed
    assert rehearsed <= 1.1 * stepped, "and is not far above it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "tuning", "micro_batch_size"),
    [
        ("Gemma2", Full(), 2),
        ("Llama", Prompt(tokens=32), 1),
        ("Llama", Prefix(tokens=32), 2),
        ("Llama", Lora(), 4),
    ],
)
def test_a_plan_of_prepared_data_is_what_the_run_takes(
    architecture, tuning, micro_batch_size, counter, builders, tmp_path
):
    """A few long samples among many short ones: no row is like the mean, or like the longest."""
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "head_dim": 32}
    model = tmp_path / "model"
    model.mkdir()
    builders.model(model, architecture, max_position_embeddings=1024, **sizes)
    draw, rows = random.Random(1), []
    for i in range(400):
        size = draw.randint(150, 400) if draw.random() < 0.05 else draw.randint(3, 30)
        rows.append(builders.chat(f"copy {i}", "".join(draw.choices("abcdefgh", k=size)), "copy"))
    data = DataConfig(train=str(builders.write(tmp_path / "rows.jsonl", rows)), max_length=512)
    size = {"batch_size": 4, "micro_batch_size": micro_batch_size}
    config = config_of(model, data, tuning, dtype=Dtype.float32, **size)
    rehearsed, stepped = measured(config, tmp_path, counter)
    assert stepped <= 1.01 * rehearsed
    facts = DataFacts.read(tmp_path / "prepared")
    job = make_job(config, find_machine(config, plans_only=False), facts)
    planned = max(phase.allocated_bytes for phase in device_phases(job))
    assert -0.01 <= planned / stepped - 1 <= 0.05
