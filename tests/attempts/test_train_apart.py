"""A training in a process of its own: how it ends, whoever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from ray_runs import processes_of, wait_until

from posttrain_dist.attempts.train_apart import SIGNALS, kernel_kills, killed, train_apart
from posttrain_dist.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.engine import AdamW
from posttrain_dist.errors import ClusterError, ModelError, OutOfMemory
from posttrain_dist.files import read_object
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.planner.fallbacks import choose
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.plan_file import write_plan
from posttrain_dist.prepare import prepare


@pytest.fixture
def run(tiny_llama, rows_file, tmp_path) -> tuple[RunConfig, Path]:
    """One that would take hours."""
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            optimizer=AdamW(lr=1e-3),
            train=TrainConfig(steps=10**6, batch_size=2, micro_batch_size=2),
            checkpoint=CheckpointConfig(export=False),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    prepare(config, folder / "prepared")
    (folder / "config.yaml").write_text(config.to_yaml())
    write_plan(folder, choose(config, find_machine(config, plans_only=False)))
    return config, folder


def child_of(folder: Path) -> int:
    """The process that trains, once it does."""
    log = folder / "samples.log"
    wait_until(lambda: log.exists() and log.stat().st_size, timeout_s=120)
    (child,) = [
        pid
        for pid in processes_of(folder)
        if b"attempts.train_apart\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return child


@pytest.mark.slow
def test_a_killed_training_says_how_it_ended_and_what_takes_less(run):
    config, folder = run
    kills = kernel_kills()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(train_apart, config, folder)
        os.kill(child_of(folder), signal.SIGKILL)
        with pytest.raises(ClusterError) as failure:
            waiting.result(timeout=60)
    assert "ended by SIGKILL" in failure.value.what
    assert "use train.micro_batch_size=1" in failure.value.fix
    assert kernel_kills() == kills, "it was not the kernel"


@pytest.mark.slow
def test_a_file_stop_ends_it_with_a_checkpoint_and_a_signal_does_not(run):
    """What a cluster sends to every process of a job the caller turns into that file."""
    config, folder = run
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(train_apart, config, folder)
        child, log = child_of(folder), folder / "samples.log"
        for number in SIGNALS:
            os.kill(child, number)
        size = log.stat().st_size
        wait_until(lambda: log.stat().st_size > size, timeout_s=60)
        (folder / "STOP").touch()
        waiting.result(timeout=60)
    outcome = read_object(folder / "logs" / "outcome.json")
    assert outcome["outcome"] == "stopped" and outcome["step"] >= 1
    assert (folder / "checkpoints" / "latest").is_file()


@pytest.mark.slow
def test_it_trains_what_it_is_given(run):
    """A start may change what the folder says, such as the number of steps."""
    config, folder = run
    train_apart(replace(config, train=replace(config.train, steps=2)), folder)
    assert read_object(folder / "logs" / "outcome.json")["step"] == 2


@pytest.mark.slow
def test_it_ends_with_its_caller(run):
    _, folder = run
    program = (
        "import sys; from pathlib import Path; from posttrain_dist.config import RunConfig\n"
        "from posttrain_dist.attempts.train_apart import train_apart\n"
        "folder = Path(sys.argv[1])\n"
        "train_apart(RunConfig.from_yaml((folder / 'config.yaml').read_text()), folder)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", program, str(folder)])
    child_of(folder)
    caller.kill()
    caller.wait()
    wait_until(lambda: not processes_of(folder), timeout_s=30)


@pytest.mark.slow
def test_an_error_of_the_user_comes_back_as_it_was(run, tmp_path):
    config, folder = run
    config = replace(config, model=ModelConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(ModelError, match="nowhere"):
        train_apart(config, folder)


def test_a_process_that_the_kernel_killed_lacked_memory_of_the_host(run):
    config, folder = run
    error = killed(config, folder, rank=3)
    assert type(error) is OutOfMemory and error.where == "rank 3"
    assert "planned were" in error.what and error.fix.startswith("use train.micro_batch_size=1")
