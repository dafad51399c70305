"""One run on a real two-node Slurm, from `posttrain submit` to FINISHED."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest

from posttrain_dist.files import read_rows

CLUSTER = Path(__file__).parent / "cluster.sh"
POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"
TIMEOUT_S = 400  # of the job; on two idle cores it takes about 40 s
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")


def missing() -> str | None:
    """Why this machine cannot have such a cluster."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm of namespaces needs root on Linux"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"not installed (Debian: slurm-wlm, munge, iproute2): {', '.join(absent)}"
    if subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True).returncode:
        return "no right to make namespaces (CAP_SYS_ADMIN)"
    return None


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.ray,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self("up", "2")

    def __call__(self, *words: str, code: int = 0) -> str:
        environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "TMPDIR": str(self.folder / "tmp"),  # private to each node, as on real ones
        }
        command = ["bash", str(CLUSTER), str(self.folder), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, f"{words}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def login(self, *words: str, code: int = 0) -> str:
        return self("login", *words, code=code)

    def state(self, job: str) -> str:
        return self.login("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def processes(self) -> dict[int, str]:
        """Everything alive that was started for this cluster or in it: pid -> command."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                if str(self.folder).encode() in environment + command:
                    found[int(folder.name)] = command.decode(errors="replace")
        return found


@pytest.fixture
def cluster():
    # Not below pytest's folder: a socket's path may have 107 bytes only.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/var/tmp"))
    try:
        cluster = Cluster(folder)
        yield cluster
    finally:
        subprocess.run(["bash", str(CLUSTER), str(folder), "down"], timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def losses(run_folder: Path) -> dict[int, float]:
    rows = read_rows(run_folder / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def the_run(root: Path) -> Path:
    [folder] = (root / "run").iterdir()
    return folder


def last_words(run_folder: Path) -> str:
    logs = sorted((run_folder / "logs").glob("*.log"))
    return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs)


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
