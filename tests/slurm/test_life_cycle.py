"""A run on a real Slurm that is disturbed in the middle, and ends as if it had not been.

Each prints a row for the table of docs/slurm.md: pytest -m slow -rP tests/slurm/test_life_cycle.py
"""

import json
import shutil
import time
from pathlib import Path

import pytest
from posttrain_launch.lifecycle import starts
from slurm_cluster import (
    LIVE,
    Cluster,
    digest_of_export,
    last_words,
    losses,
    missing,
    step_of,
    waited,
)

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

STEPS, SAVE_EVERY = 600, 100
LONG_STEPS = 1500  # Slurm looks at time limits every 30 s
DISTURBED_AT = 150  # a step between two saves
NODES = 2


@pytest.fixture(scope="module")
def words(tiny_llama, rows_file) -> list[str]:
    return [
        f"model.path={tiny_llama}",
        f"data.train={rows_file}",
        "data.max_length=64",
        "engine=zero2",
        f"train.save_every={SAVE_EVERY}",
        "train.batch_size=4",
        "train.dtype=float32",
        "train.log_every=1",
        "optimizer.lr=0.003",
        "logging.wandb=offline",
        f"cluster.workers={NODES}",
        f"cluster.nodes={NODES}",
        "cluster.cpus_per_node=1",
        "cluster.gpus_per_node=0",
        "cluster.preflight=false",
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, run_workers):
    """The same frozen run as two processes here, without Slurm and Ray."""
    made: dict[int, Path] = {}

    def of(run_folder: Path, steps: int) -> Path:
        if steps not in made:
            plain = tmp_path_factory.mktemp("plain")
            shutil.copy(run_folder / "config.yaml", plain)
            config = (plain / "config.yaml").read_text()
            (plain / "config.yaml").write_text(config.replace("wandb: offline", "wandb: 'off'"))
            shutil.copytree(run_folder / "prepared", plain / "prepared")
            run_workers("train_runs.py", NODES, plain)
            made[steps] = plain
        return made[steps]

    return of


# ------------------------------------------------------------------------------- disturbances


def time_limit(cluster: Cluster, job: str) -> None:
    """Of two minutes; it is raised once the job is in the queue again."""
    waited(lambda: cluster.state(job) != "RUNNING", 90, Path())
    cluster.login("scontrol", "update", f"JobId={job}", "TimeLimit=30")


def signal(cluster: Cluster, job: str) -> None:
    cluster.login("scancel", "--batch", "--signal=USR1", job)


def requeue(cluster: Cluster, job: str) -> None:
    cluster.login("scontrol", "requeue", job)


def preempt(cluster: Cluster, job: str) -> None:
    urgent = ["--partition=urgent", f"--nodes={NODES}", "--exclusive", "--output=/dev/null"]
    cluster.login("sbatch", *urgent, "--wrap=sleep 5")


def power_off(cluster: Cluster, node: int) -> None:
    cluster.fault("power-off", str(node))


def come_back(cluster: Cluster, job: str, *words: str) -> None:
    """Once Slurm has given up the node."""
    waited(lambda: cluster.state(job) != "RUNNING", 90, Path())
    cluster.fault(*words)


FAULTS = {
    "the time limit": time_limit,
    "scancel --signal": signal,
    "scontrol requeue": requeue,
    "preemption": preempt,
    "a worker node goes off": lambda cluster, job: (
        power_off(cluster, 2),
        come_back(cluster, job, "boot", "2"),
    ),
    "the head node goes off": lambda cluster, job: (
        power_off(cluster, 1),
        come_back(cluster, job, "boot", "1"),
    ),
    "a cable is pulled": lambda cluster, job: (
        cluster.fault("unplug", "2"),
        come_back(cluster, job, "plug", "2"),
    ),
    "slurmd is killed": lambda cluster, job: (
        cluster.fault("kill-slurmd", "2"),
        come_back(cluster, job, "start-slurmd", "2"),
    ),
    "the controller restarts": lambda cluster, job: cluster.fault("restart-controller"),
}
# Cause of the first start, as its line says; None: it left no word.
CAUSES = {
    "the time limit": "time_limit",
    "scancel --signal": "time_limit",
    "preemption": "preempted",
}
UNDISTURBED = ("the controller restarts",)
SAVED = ("the time limit", "scancel --signal", "preemption")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disturbed_run_ends_as_if_it_had_not_been(fault, words, undisturbed, cluster, tmp_path):
    steps, own = STEPS, ["cluster.time=00:30:00"]
    if fault == "preemption":
        own += ["cluster.partition=low"]
    if fault == "the time limit":  # the signal comes at the last look that leaves 45 s
        steps, own = LONG_STEPS, ["cluster.time=00:02:00", "cluster.extra=['--signal=B:USR1@45']"]
    job, folder = cluster.submit(*words, f"train.steps={steps}", *own, root=tmp_path)
    waited(lambda: step_of(folder) >= DISTURBED_AT, 150, folder)
    began = time.monotonic()
    FAULTS[fault](cluster, job)
    row = follow(cluster, job, folder, began)
    assert cluster.state(job) == "COMPLETED", last_words(folder)

    # Every step once, every sample once, the same weights.
    plain = undisturbed(folder, steps)
    assert json.loads((folder / "FINISHED").read_text())["step"] == steps
    assert losses(folder) == losses(plain)
    assert (folder / "samples.log").read_text() == (plain / "samples.log").read_text()
    assert digest_of_export(folder) == digest_of_export(plain)
    lineage = json.loads((folder / "run.json").read_text())
    names = [each.name for each in (folder / "wandb").glob("*run-*")]
    assert {name.rsplit("-", 1)[1] for name in names} == {lineage["wandb_id"]}

    # One start more, and not two.
    found = starts.read(folder)
    assert len(found) == (1 if fault in UNDISTURBED else 2), found
    assert found[-1]["cause"] == "finished"
    assert [each["restart_count"] for each in found] == list(range(len(found)))
    if fault in CAUSES:
        assert found[0]["cause"] == CAUSES[fault]
    if fault in SAVED:
        assert row["wasted_steps"] == 0
    assert row["wasted_steps"] <= SAVE_EVERY
    assert cluster.of_jobs() == []
    print(json.dumps({"disturbance": fault, **row}))


def follow(cluster: Cluster, job: str, folder: Path, began: float) -> dict[str, float]:
    """Wait for the end of a job; Slurm's hold of a job that is queued again, 121 s, is lifted.

    Returns:
        recovery_s: from the disturbance until a step is logged that had not been.
        wasted_steps: that were made twice.
    """
    reached, recovered = step_of(folder), 0.0
    end = time.monotonic() + 230
    while (state := cluster.state(job)) in LIVE:
        assert time.monotonic() < end, f"{state}\n{last_words(folder)}"
        if state == "PENDING":
            cluster.lift_hold(job)
        second = len(starts.read(folder)) > 1
        reached = reached if second else max(reached, step_of(folder))
        if not recovered and step_of(folder) > reached and (second or state == "RUNNING"):
            recovered = time.monotonic() - began
        time.sleep(0.5)
    found = starts.read(folder)
    wasted = reached - found[-1]["before"] if len(found) > 1 else 0
    return {"recovery_s": round(recovered, 1), "wasted_steps": wasted}
