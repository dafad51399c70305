"""One run on a real two-node Slurm, from `posttrain submit` to FINISHED."""

import json
import shutil
import time

import pytest
from slurm_cluster import POSTTRAIN, last_words, losses, missing

TIMEOUT_S = 400  # of the job; on two idle cores it takes about 40 s

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.ray,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


def the_run(root):
    [folder] = (root / "run").iterdir()
    return folder


def test_two_nodes_train_as_two_processes_here_do(cluster, tmp_path, run_workers):
    run = [
        "model.path=tiny_base",
        "data.train=embedded",
        "data.max_length=256",
        "engine=zero1",
        "train.steps=2",
        "train.batch_size=4",
        "train.dtype=float32",
        "optimizer.lr=0.003",
        "logging.wandb=off",
        "cluster.workers=2",
    ]
    submit = [
        str(POSTTRAIN),
        "submit",
        *run,
        "cluster=slurm",
        "cluster.nodes=2",
        "cluster.cpus_per_node=1",
        "cluster.gpus_per_node=0",
        "cluster.network_interface=eth0",
        "cluster.time='00:15:00'",
    ]
    elsewhere = ["cluster.partition=nowhere", f"output_root={tmp_path / 'refused'}"]
    refused = cluster.login(*submit, *elsewhere, code=1)
    assert "sbatch refused the job" in refused
    assert "invalid partition specified: nowhere" in refused

    submitted = cluster.login(*submit, f"output_root={tmp_path / 'slurm'}")
    assert "2 nodes with 0 GPUs and 1 CPUs each, time 00:15:00" in submitted
    job = submitted.partition("submitted job ")[2].split()[0]
    run_folder = the_run(tmp_path / "slurm")
    end = time.monotonic() + TIMEOUT_S
    while (state := cluster.state(job)) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < end, last_words(run_folder)
        time.sleep(0.5)

    assert state == "COMPLETED", last_words(run_folder)
    finished = json.loads((run_folder / "FINISHED").read_text())
    assert finished["step"] == 2
    # One worker on each node: a rank's log is written by the node that it ran on.
    ray_logs = sorted(log.name for log in (run_folder / "logs").glob("ray-*.log"))
    assert ray_logs == [f"ray-{job}-node1.log", f"ray-{job}-node2.log"]
    assert sorted(log.name for log in (run_folder / "ray").glob("logs-*")) == [
        "logs-node1",
        "logs-node2",
    ]
    assert not list((run_folder / "ray").glob("token-*"))
    for words in ("gcs_server", "raylet", "ray::", "posttrain", "srun"):
        left = [command for command in cluster.processes().values() if words in command]
        assert not left, left
    cluster("down")
    assert cluster.processes() == {}

    # The same frozen run without Slurm and Ray; that a local Ray gives these numbers too is told
    # by tests/launch/ray.
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(run_folder / "config.yaml", plain)
    shutil.copytree(run_folder / "prepared", plain / "prepared")
    run_workers("train_runs.py", 2, plain)
    there, here = losses(run_folder), losses(plain)
    assert list(there) == [1, 2]
    assert there == pytest.approx(here, rel=1e-6)
