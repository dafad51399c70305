"""One run on a real two-node Slurm, from `posttrain submit` to FINISHED."""

import json
import shutil

import pytest
from posttrain_launch.lifecycle import starts
from slurm_cluster import LIVE, last_words, losses, missing, step_of

TIMEOUT_S = 400  # of the job; on two idle cores it takes about 70 s
STEPS = 6

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.ray,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


def words(engine: str, nodes: int) -> list[str]:
    return [
        "model.path=tiny_base",
        "data.train=embedded",
        "data.max_length=256",
        f"engine={engine}",
        f"train.steps={STEPS}",
        "train.batch_size=4",
        "train.dtype=float32",
        "train.log_every=1",
        "optimizer.lr=0.003",
        "logging.wandb=off",
        f"cluster.workers={nodes}",
        f"cluster.nodes={nodes}",
        "cluster.cpus_per_node=1",
        "cluster.gpus_per_node=0",
        "cluster.time=00:15:00",
    ]


def the_same_here(run_folder, nodes, tmp_path, run_workers):
    """Losses of the same frozen run without Slurm and Ray.

    tests/launch/ray has the same of a local Ray.
    """
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(run_folder / "config.yaml", plain)
    shutil.copytree(run_folder / "prepared", plain / "prepared")
    run_workers("train_runs.py", nodes, plain)
    return losses(plain)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("engine", "nodes", "interrupted"),
    [
        pytest.param("zero2", 2, False),
        pytest.param("zero2", 2, True, marks=SLOW),
        pytest.param("zero3", 2, True, marks=SLOW),
        pytest.param("zero2", 4, True, marks=SLOW),
        pytest.param("zero3", 4, True, marks=SLOW),
    ],
)
def test_nodes_train_as_processes_here_do(
    engine, nodes, interrupted, made_cluster, tmp_path, run_workers
):
    cluster = made_cluster(nodes)
    job, run_folder = cluster.submit(*words(engine, nodes), root=tmp_path / "slurm")
    if interrupted:  # it is asked to save and leave, as it is when its time is up
        cluster.wait(lambda: step_of(run_folder) >= 2, TIMEOUT_S, run_folder)
        cluster.login("scancel", "--batch", "--signal=USR1", job)
        cluster.wait_for_start(job, 2, run_folder, 90)
    cluster.wait(lambda: cluster.state(job) not in LIVE, TIMEOUT_S, run_folder)
    assert cluster.state(job) == "COMPLETED", cluster.last_words() + last_words(run_folder)

    assert json.loads((run_folder / "FINISHED").read_text())["step"] == STEPS
    *before, last = starts.read(run_folder)
    ends = [(start["cause"], start["code"], start["action"]) for start in before]
    assert ends == [("time_limit", 85, "requeue")] * interrupted
    assert all(2 <= start["step"] == last["before"] < STEPS for start in before)
    assert (last["cause"], last["restart_count"], last["job"]) == ("finished", interrupted, job)
    # One worker on each node: a rank's log is written by the node that it ran on.
    names = [f"node{i + 1}" for i in range(nodes)]
    logs = sorted(log.name for log in (run_folder / "logs").glob("ray-*.log"))
    assert logs == [f"ray-{job}-{name}.log" for name in names]
    kept = sorted(log.name for log in (run_folder / "ray").glob("logs-*"))
    assert kept == [f"logs-{name}" for name in names]
    assert not list((run_folder / "ray").glob("token-*"))
    cluster.wait_for_no_process(run_folder)
    cluster("down")
    assert cluster.processes() == {}

    there, here = losses(run_folder), the_same_here(run_folder, nodes, tmp_path, run_workers)
    assert list(there) == list(range(1, STEPS + 1))
    assert there == pytest.approx(here, rel=1e-6)
