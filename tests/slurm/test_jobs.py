"""Jobs on a real Slurm that train nothing: nodes looked at, refusals, `--wait`, secrets."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from posttrain_launch.batch.job_options import options
from posttrain_launch.batch.job_script import PARTS, arrays, script, variables
from ray_runs import wait_until
from slurm_cluster import POSTTRAIN, Cluster, missing

from posttrain_dist.config import RunConfig, Slurm, complete
from posttrain_dist.config.cluster import ContainerRuntime

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
CANARY = "canary-5f1d0c3b7a9e"  # of W&B
# Stands in for an image: runs the command that follows its name here, and keeps what it was given.
APPTAINER = """#!/bin/bash
echo "$*" >>"$POSTTRAIN_RUN/apptainer.txt"
while [ "$1" != /images/posttrain.sif ]; do shift; done
shift
exec "$@"
"""
# Follows a job as `submit --wait` does.
FOLLOW = """
import sys
from pathlib import Path
from posttrain_launch.batch.follow import follow
sys.exit(follow(sys.argv[1], Path(sys.argv[2]), every_s=0.2))
"""


def make_run(folder: Path, end: str = "log passed", **fields) -> Path:
    """A run folder whose job ends before it would start Ray."""
    config = complete(
        RunConfig(
            name="mine",
            cluster=Slurm(
                gpus_per_node=0,
                cpus_per_node=1,
                time="00:05:00",
                network_interface="eth0",
                **fields,
            ),
        )
    )
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    text = script(
        options("mine", cluster, folder), variables(config, folder), arrays(config, folder),
        parts=PARTS[:3],
    )  # fmt: skip
    (folder / "job.sbatch").write_text(f"{text}\n{end}\n")
    return folder


def send(cluster: Cluster, folder: Path) -> str:
    return cluster.login("sbatch", "--parsable", str(folder / "job.sbatch")).strip()


def wait_for_end(cluster: Cluster, job: str) -> str:
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    return cluster.wait_for_state(job, *ends, timeout_s=90)


def log_of(folder: Path, job: str) -> str:
    return (folder / "logs" / f"slurm-{job}.log").read_text()


def in_node(cluster: Cluster, number: int, *words: str) -> None:
    pid = (cluster.folder / f"init-node{number}").read_text().strip()
    subprocess.run(["nsenter", f"--target={pid}", "--mount", *words], check=True)


def test_a_node_that_does_not_see_the_run_folder_is_named_and_left_out(
    made_cluster, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    cluster = made_cluster(3)
    folder = make_run(
        tmp_path / "run",
        end='[ "$WANDB_API_KEY" = "$(echo canary)-5f1d0c3b7a9e" ] && log "has the key"; sleep 1',
        nodes=2,
        exclude_bad_nodes=True,
    )
    in_node(cluster, 2, "mount", "-t", "tmpfs", "none", str(folder))
    job = send(cluster, folder)
    log = folder / "logs" / f"slurm-{job}.log"
    wait_until(lambda: log.exists() and "back into the queue" in log.read_text(), 60)
    cluster.wait_for_state(job, "PENDING", timeout_s=60)
    said = log_of(folder, job)
    assert f"preflight: error: node2: cannot use the run folder {folder}: no such file" in said
    assert "fix: set output_root to storage that all nodes see" in said
    assert "back into the queue without node2" in said
    wait_until(lambda: cluster.facts(job)["ExcNodeList"] == "node2", 20)

    def runs_again() -> bool:
        cluster.lift_hold_at_end(job)
        return cluster.state(job) == "RUNNING"

    wait_until(runs_again, 60)
    commands = cluster.processes().values()
    assert wait_for_end(cluster, job) == "COMPLETED", log_of(folder, job)
    assert cluster.facts(job)["NodeList"] == "node[1,3]"
    said = log_of(folder, job)
    assert "preflight: 2 nodes with 0 GPUs each, versions and config equal, " in said
    assert "all-reduce" in said
    verdict = json.loads((folder / "logs" / "nodes" / "verdict.json").read_text())
    assert (verdict["passed"], verdict["start"]) == (True, f"{job}.1")
    # The key has reached the job, and is nowhere to be read.
    assert "has the key" in said
    assert not [each for each in commands if CANARY in each]
    assert CANARY not in cluster.login("scontrol", "show", "job", "-dd", job)
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(texts) > 6
    assert not [text for text in texts if CANARY.encode() in text]


def test_a_job_is_followed_to_its_end(cluster, tmp_path):
    def follow(job: str, folder: Path, code: int) -> str:
        return cluster.login(sys.executable, "-c", FOLLOW, job, str(folder), code=code)

    # Without preflight, a job is over in a second.
    done = make_run(tmp_path / "done", 'touch "$POSTTRAIN_RUN/FINISHED"', preflight=False)
    said = follow(send(cluster, done), done, 0)
    assert f"finished: {done}" in said
    fails = make_run(tmp_path / "fails", 'log "error: it was so"; exit 3', preflight=False)
    job = send(cluster, fails)
    said = follow(job, fails, 3)
    assert f"job {job} has ended without FINISHED: FAILED, exit code 3" in said
    assert "error: it was so" in said
    assert f"again: posttrain submit {fails}" in said
    unseen = make_run(cluster.folder / "tmp" / "run", preflight=False)  # each node has its own
    job = send(cluster, unseen)
    said = follow(job, unseen, 1)
    assert f"it wrote no {unseen}/logs/slurm-{job}.log: output_root must be on storage" in said
    large = make_run(tmp_path / "large", preflight=False, nodes=3)  # of two
    job = send(cluster, large)
    environment = {**os.environ, "SLURM_CONF": str(cluster.folder / "slurm.conf")}
    words = ["bash", str(Path(__file__).parent / "cluster.sh"), str(cluster.folder), "login"]
    watch = subprocess.Popen(
        [*words, sys.executable, "-c", FOLLOW, job, str(large)],
        env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # this may be under nohup
    )  # fmt: skip
    assert watch.stdout is not None
    first = ""
    while "fix:" not in first and (line := watch.stdout.readline()):
        first += line
    assert f"job {job}: PENDING (PartitionConfig)" in first
    assert "it never starts so; fix: cluster.partition: " in first
    assert f"; scancel {job}" in first
    os.killpg(watch.pid, 2)  # Ctrl-C
    rest, _ = watch.communicate(timeout=20)
    assert watch.returncode == 130
    assert f"job {job} goes on" in rest and f"cancel:  scancel {job}" in rest
    assert cluster.state(job) == "PENDING"


@pytest.mark.slow
def test_what_looks_at_a_node_runs_inside_the_image(cluster, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apptainer").write_text(APPTAINER)
    (programs / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{POSTTRAIN.parent}:{os.environ['PATH']}")
    image = {"container": "/images/posttrain.sif", "container_mounts": ["/scratch:/s:ro"]}
    folder = make_run(
        tmp_path / "run", nodes=2, container_runtime=ContainerRuntime.apptainer, **image
    )
    job = send(cluster, folder)
    assert wait_for_end(cluster, job) == "COMPLETED", log_of(folder, job)
    assert "preflight: 2 nodes with 0 GPUs each" in log_of(folder, job)
    given = (folder / "apptainer.txt").read_text()
    assert given.count("exec --bind=/tmp --bind=/scratch:/s:ro --pwd=") == 2  # once on each node
    assert given.count("python3 -m posttrain_launch.preflight.node_check") == 2


def test_what_cannot_fit_is_refused_by_its_key(cluster, tmp_path):
    def submit(*words: str, code: int = 1) -> str:
        return cluster.login(str(POSTTRAIN), "submit", *words, code=code)

    first = [
        "model.path=tiny_base", "cluster=slurm_cpu", "cluster.time=00:05:00",
        "cluster.memory_per_node=640G", f"output_root={tmp_path}",
    ]  # fmt: skip
    assert "error: cluster.memory_per_node: sbatch refused the job: " in submit(*first)
    [folder] = (tmp_path / "run").iterdir()
    fits = "cluster.memory_per_node=100M"
    said = submit(str(folder), fits, "cluster.partition=nowhere")
    assert "error: cluster.partition: sbatch refused the job: " in said
    said = submit(str(folder), "cluster.partition=main", "cluster.constraint=a100")
    assert "error: cluster.constraint: sbatch refused the job: " in said
    said = submit(str(folder), "cluster.constraint=null", 'cluster.extra=["--hold"]', code=0)
    job = said.partition("submitted job ")[2].split()[0]
    said = submit(str(folder))
    assert f"job {job} drives this run already: PENDING" in said
    cluster.login("scancel", job)
    wait_for_end(cluster, job)
    again = submit(str(folder), code=0).partition("submitted job ")[2].split()[0]
    assert int(again) == int(job) + 1
