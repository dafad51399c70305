"""A sweep as one array on a real Slurm of two nodes, with one trial's process killed."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from posttrain_launch.run.job_record import read_job
from posttrain_launch.sweep.folder import read_sweep, read_trials
from posttrain_launch.sweep.results import read_results
from ray_runs import wait_until
from slurm_cluster import POSTTRAIN, SCRIPT, missing, step_of

from posttrain_dist.files import read_rows

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
RUN = ["data.max_length=128", "train.batch_size=2", "train.dtype=float32", "tuning=lora",
       "train.steps=150", "train.save_every=25", "train.eval_every=75", "logging.wandb=off",
       "data.eval_fraction=0.2"]  # fmt: skip
JOB = ["cluster.gpus_per_node=0", "cluster.cpus_per_node=1", "cluster.network_interface=eth0",
       "cluster.time='00:15:00'", "cluster.preflight=false"]  # fmt: skip


def started(cluster, *words: str, log: Path) -> subprocess.Popen:
    """`posttrain words`, in the background, where it reaches the controller."""
    environment = {**os.environ, "SLURM_CONF": str(cluster.folder / "slurm.conf"),
                   "TMPDIR": str(cluster.folder / "tmp")}  # fmt: skip
    command = ["bash", str(SCRIPT), str(cluster.folder), "login", str(POSTTRAIN), *words]
    with log.open("ab") as out:
        return subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )


def test_six_trials_on_two_nodes(cluster, tiny_llama, rows_file, tmp_path):
    values = ["tuning.rank=2,4,8", "optimizer.lr=1e-2,3e-2"]
    places = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={tmp_path}/out"]
    launcher = ["hydra/launcher=slurm_array", "hydra.launcher.at_once=2"]
    log = tmp_path / "sweep.log"
    process = started(cluster, "train", "-m", *places, *RUN, *JOB, *values, *launcher, log=log)
    try:
        script = lambda: next((tmp_path / "out").glob("run/sweeps/*/array-000.sbatch"), None)  # noqa: E731
        wait_until(lambda: process.poll() is not None or script(), 120)
        assert process.poll() is None, log.read_text()
        folder = script().parent
        first = folder / "trial-000"
        wait_until(lambda: len(list(folder.glob("trial-*/job.json"))) == 6, 60)
        wait_until(lambda: "submitted array" in log.read_text(), 10)
        job = read_job(first).id.partition("_")[0]
        # The sweep's process dies; the array lives on, and is found again.
        os.killpg(process.pid, signal.SIGKILL)
        wait_until(lambda: step_of(first) >= 26, 200)
        [pid] = drivers_of(first)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: cluster.state(f"{job}_0") == "PENDING", 60)
        cluster.lift_hold(f"{job}_0")
        process = started(cluster, "run", str(folder), log=log)
        code = process.wait(400)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    text = log.read_text()
    jobs = {read_job(trial.folder).id for trial in read_trials(folder)}
    assert jobs == {f"{job}_{number}" for number in range(6)}, text
    assert text.count("submitted array") == 1

    results = read_results(read_sweep(folder))
    assert {trial["state"] for trial in results["trials"]} == {"done"}, text
    assert code == 0
    for trial in results["trials"]:
        rows = read_rows(Path(trial["folder"]) / "metrics.jsonl")
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps))
        assert steps[-1] == 150
        assert trial["value"] == rows[-1]["eval/loss"]
    # The one whose driver was killed came back, and lost what it had not saved.
    starts = (first / "logs" / "starts.jsonl").read_text().splitlines()
    assert max(json.loads(line)["start"] for line in starts) == 2
    said = "".join(each.read_text() for each in (first / "logs").glob("slurm-*.log"))
    [step] = re.findall(r"^going on from step (\d+)$", said, re.MULTILINE)
    assert 25 <= int(step) < 150


def drivers_of(run_folder: Path) -> list[int]:
    """Processes `posttrain run <folder>`, srun's among them left out."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(run_folder) in words and "run" in words and "python" in words[0]:
            found.append(int(entry.parent.name))
    return found
