"""What a launch must not pay for: processes, reads and waits that the way to step 1 can spare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from posttrain_launch.ray.gate import CLOSED, OPEN, SOON_BYTES, is_soon, set_gate, wait_for_data

from posttrain_dist.config import DataConfig, RunConfig, complete
from posttrain_dist.models.folder import load_tokenizer


def test_ray_train_keeps_every_part_but_the_named_ones(tmp_path):
    source = f"""
import json
import posttrain_dist.config
from posttrain_launch.ray import trainer as ray_train
from posttrain_launch.ray.lean_trainer import LeanTrainer
from ray.train import RunConfig, ScalingConfig, UserCallback
from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

given = {{}}
DataParallelTrainer._initialize_and_run_controller = lambda self, **all: given.update(all)
made = {{}}
callback = ray_train.RefuseRetry(posttrain_dist.config.RunConfig(), None)
for trainer in (LeanTrainer, DataParallelTrainer):
    lean = trainer(
        print,
        backend_config=ray_train.PlainConfig(),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path={str(tmp_path)!r}, callbacks=[callback]),
    )
    made[trainer.__name__] = [type(each).__name__ for each in lean._create_default_callbacks()]
    policy = create_scaling_policy(lean.scaling_config)
    lean._initialize_and_run_controller(scaling_policy=policy)
    try:  # asks an actor, and there is no Ray here
        given["scaling_policy"]._send_resource_request()
        decision = given["scaling_policy"].make_decision_for_non_running_worker_group()
        made[trainer.__name__].append(decision.num_workers)
    except AssertionError:
        made[trainer.__name__].append("asks")
print(json.dumps(made))
"""
    environment = {**os.environ, "RAY_TRAIN_METRICS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    lean, stock = made["LeanTrainer"], made["DataParallelTrainer"]
    unused = ["DatasetsCallback", "PlacementGroupCleanerCallback"]
    assert stock[-1] == "asks" and lean[-1] == 2
    assert sorted(lean[:-1] + unused) == sorted(stock[:-1])


def test_a_tokenizer_is_read_once_until_a_file_of_it_changes(tmp_path, builders):
    builders.tokenizer(tmp_path)
    first = load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path) is first
    settings = tmp_path / "tokenizer_config.json"
    changed = {**json.loads(settings.read_text()), "eos_token": "<|user|>"}
    settings.write_text(json.dumps(changed))
    assert first.eos_token == "<|end|>"
    assert load_tokenizer(tmp_path).eos_token == "<|user|>"


# --------------------------------------------------------------------------------- the gate


def test_a_worker_waits_until_the_data_is_prepared(tmp_path):
    set_gate(tmp_path, CLOSED)
    through = threading.Event()
    worker = threading.Thread(target=lambda: (wait_for_data(tmp_path), through.set()))
    worker.start()
    assert not through.wait(0.3)
    set_gate(tmp_path, OPEN)
    assert through.wait(10)
    worker.join()


def test_a_worker_of_a_run_without_a_gate_does_not_wait(tmp_path):
    through = threading.Event()
    waiting = lambda: (wait_for_data(tmp_path), through.set())  # noqa: E731
    threading.Thread(target=waiting, daemon=True).start()
    assert through.wait(10)


def test_workers_start_early_only_where_the_data_is_soon_there(tmp_path, rows_file):
    def config(path: Path | str) -> RunConfig:
        return complete(RunConfig(data=DataConfig(train=str(path))))

    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(SOON_BYTES + 1)
    assert is_soon(config("embedded"), tmp_path)
    assert is_soon(config(rows_file), tmp_path)
    assert not is_soon(config(large), tmp_path)
    assert not is_soon(config("hf:someone/rows"), tmp_path)  # is not even looked for
    assert not is_soon(config(tmp_path / "missing.jsonl"), tmp_path)
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "summary.json").write_text("{}")
    assert is_soon(config(large), tmp_path)
