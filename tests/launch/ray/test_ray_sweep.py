"""A sweep on a Ray: its trials side by side on what is free, and gone on with after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest
from posttrain_launch.sweep.folder import read_sweep, read_trials
from posttrain_launch.sweep.results import read_results
from ray_runs import losses, processes_of, wait_until

from posttrain_dist.files import read_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]

POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"
RUN = ["data.max_length=128", "train.batch_size=2", "train.dtype=float32", "tuning=lora",
       "train.steps=4", "optimizer.lr=1e-2", "logging.wandb=off",
       "data.eval_fraction=0.2"]  # fmt: skip


def started(*words: str, log: Path) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with log.open("ab") as out:
        return subprocess.Popen([str(POSTTRAIN), *words], stdout=out, stderr=out, env=environment)


def test_trials_share_two_workers_and_outlive_their_driver(tiny_llama, rows_file, tmp_path):
    places = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={tmp_path}/out"]
    log = tmp_path / "log"
    words = ["train", "-m", "hydra/launcher=ray", *places, *RUN, "tuning.rank=2,4,8"]
    process = started(*words, log=log)
    try:
        begun = lambda: list((tmp_path / "out").glob("run/sweeps/*/trial-*/metrics.jsonl"))  # noqa: E731
        wait_until(lambda: process.poll() is not None or begun(), 120)
        assert process.poll() is None, log.read_text()
        folder = begun()[0].parents[1]
        # Two at once: this machine has two CPUs, and each trial takes one.
        wait_until(lambda: len(started_trials(folder)) >= 2, 60)
        if (os.cpu_count() or 1) == 2:
            assert len(started_trials(folder)) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = started("run", str(folder), log=log)
        assert process.wait(200) == 0, log.read_text()
    finally:
        process.kill()
    trials = read_trials(folder)
    assert len(trials) == 3
    results = read_results(read_sweep(folder))
    assert {trial["state"] for trial in results["trials"]} == {"done"}
    for trial in trials:
        assert [row["step"] for row in read_rows(trial.folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]
        assert json.loads((trial.folder / "FINISHED").read_text())["step"] == 4
        # Ray drove it, and its losses are those of the same run here.
        assert (trial.folder / "logs" / "terminal.log").is_file()
    wait_until(lambda: processes_of(folder) == [], 20)
    alone = started("train", *places, *RUN, "tuning.rank=2", log=log)
    assert alone.wait(100) == 0, log.read_text()
    [plain] = (tmp_path / "out" / "run").glob("2*")
    assert losses(trials[0].folder) == pytest.approx(losses(plain), rel=1e-6)


def started_trials(folder: Path) -> list[Path]:
    return list(folder.glob("trial-*/logs/terminal.log"))
