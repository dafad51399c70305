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
)

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

SAVE_EVERY = 100
AFTER = 50  # steps of a start before it is disturbed, between two saves
LONG = 3000  # steps that are not over within a minute; two idle cores make 45 in a second
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
        "optimizer.lr=0.0001",  # nothing is memorised: losses stay far from 0
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


def time_limit(cluster: Cluster, job: str) -> float:
    """Of two minutes; it is raised once the job is in the queue again. The moment of that."""
    cluster.wait(lambda: cluster.state(job) != "RUNNING", 90, Path())
    ended = time.monotonic()
    cluster.login("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    return ended


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
    cluster.wait(lambda: cluster.state(job) != "RUNNING", 90, Path())
    cluster.fault(*words)


FAULTS = {
    "scancel --signal=USR1": signal,
    "scontrol requeue": requeue,
    "preemption": preempt,
    "the time limit, seen by the driver": time_limit,
    "the time limit, by Slurm's signal": time_limit,
    "a worker node loses its power": lambda cluster, job: (
        cluster.fault("power-off", "2"),
        come_back(cluster, job, "boot", "2"),
    ),
    "the head node loses its power": lambda cluster, job: (
        cluster.fault("power-off", "1"),
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
# Cause of the start that ends, where it can say one.
CAUSES = {
    "the time limit, seen by the driver": "time_limit",
    "the time limit, by Slurm's signal": "time_limit",
    "scancel --signal=USR1": "time_limit",
    "preemption": "preempted",
}
SAVED = tuple(CAUSES)
GOES_ON = ("the controller restarts",)
# One run each; its faults come one after the other.
RUNS = {
    "signal": ["scancel --signal=USR1"],
    "requeue": ["scontrol requeue"],
    "preemption": ["preemption"],
    "driver": ["the time limit, seen by the driver"],
    "limit": ["the time limit, by Slurm's signal"],
    "controller and worker": ["the controller restarts", "a worker node loses its power"],
    "head": ["the head node loses its power"],
    "cable": ["a cable is pulled"],
    "slurmd": ["slurmd is killed"],
}
# Slurm looks every 30 s, so that its signal comes at the last look that leaves as many seconds. The
# driver leaves some 35 s before the end by itself.
SIGNAL_S = {"driver": 1, "limit": 45}


@pytest.mark.parametrize("name", RUNS)
def test_a_disturbed_run_ends_as_if_it_had_not_been(name, words, undisturbed, cluster, tmp_path):
    faults = RUNS[name]
    steps, own = 300, ["cluster.time=00:30:00"]
    if name == "preemption":
        own += ["cluster.partition=low"]
    if name == "slurmd":  # its node is given up half a minute later, and trains meanwhile
        steps = LONG
    if name in SIGNAL_S:
        line = f"--signal=B:USR1@{SIGNAL_S[name]}"
        steps, own = LONG, ["cluster.time=00:02:00", f"cluster.extra=['{line}']"]
    job, folder = cluster.submit(*words, f"train.steps={steps}", *own, root=tmp_path)
    rows = []
    for fault in faults:
        begins_at = max((start["before"] for start in starts.read(folder)), default=0)
        cluster.wait(lambda at=begins_at + AFTER: step_of(folder) >= at, 150, folder)
        began, reached = time.monotonic(), step_of(folder)
        moment = FAULTS[fault](cluster, job)
        began = moment if isinstance(moment, float) else began
        if fault in GOES_ON:
            assert step_of(folder) > reached
            rows.append({"disturbance": fault, "recovery_s": 0.0, "wasted_steps": 0})
        else:
            rows.append({"disturbance": fault, **recovery(cluster, job, folder, began)})
    cluster.wait(lambda: cluster.state(job) not in LIVE, 300, folder)
    print("\n".join(map(json.dumps, rows)))
    assert cluster.state(job) == "COMPLETED", cluster.last_words() + last_words(folder)

    # Every step once, every sample once, the same weights.
    plain = undisturbed(folder, steps)
    assert json.loads((folder / "FINISHED").read_text())["step"] == steps
    assert losses(folder) == losses(plain)
    assert (folder / "samples.log").read_text() == (plain / "samples.log").read_text()
    assert digest_of_export(folder) == digest_of_export(plain)
    lineage = json.loads((folder / "run.json").read_text())
    names = [each.name for each in (folder / "wandb").glob("*run-*")]
    assert {name.rsplit("-", 1)[1] for name in names} == {lineage["wandb_id"]}

    # One start more for each fault, and not two.
    found = starts.read(folder)
    again = [fault for fault in faults if fault not in GOES_ON]
    assert len(found) == len(again) + 1, found
    assert found[-1]["cause"] == "finished"
    assert [each["restart_count"] for each in found] == list(range(len(found)))
    for fault, start in zip(again, found, strict=False):
        if fault in CAUSES:
            assert start["cause"] == CAUSES[fault]
    if name in SIGNAL_S:
        [log] = (folder / "logs").glob("slurm-*")
        by = {"driver": "s away: saving and leaving", "limit": "USR1: the time limit is near"}
        assert {key for key, words in by.items() if words in log.read_text()} == {name}
    for row in rows:
        assert row["wasted_steps"] <= (0 if row["disturbance"] in SAVED else SAVE_EVERY)
    cluster.wait_for_no_process(folder)


def recovery(cluster: Cluster, job: str, folder: Path, began: float) -> dict[str, float]:
    """Wait until a step is logged that had not been; Slurm's hold of 121 s is lifted.

    Returns:
        recovery_s: from the disturbance until then.
        wasted_steps: that were made twice.
    """
    count, reached = len(starts.read(folder)), 0
    end = time.monotonic() + 150
    while time.monotonic() < end:
        cluster.lift_hold_at_end(job)
        found = starts.read(folder)
        if len(found) == count:
            reached = max(reached, step_of(folder))
        elif step_of(folder) > reached:
            wasted = reached - found[-1]["before"]
            return {"recovery_s": round(time.monotonic() - began, 1), "wasted_steps": wasted}
        time.sleep(0.5)
    raise AssertionError(f"{cluster.last_words()}\n{last_words(folder)}")
