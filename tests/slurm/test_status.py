"""status, logs and cancel of jobs on a real Slurm of two nodes; the jobs are shell, no training."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from slurm_cluster import POSTTRAIN, Cluster, missing

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

# What a run does as seen from its folder: it goes on until STOP is there, then says how it ended.
OBEYS = """#!/bin/bash
until [ -e STOP ]; do sleep 0.1; done
echo '{"outcome": "stopped", "step": 40, "total_steps": 100}' >logs/outcome.json
exit 130
"""
DEAF = "#!/bin/bash\nsleep 300\n"


class Login:
    """A login node of the cluster, with the runs that were sent from it."""

    def __init__(self, cluster: Cluster, root: Path) -> None:
        self.slurm, self.root = cluster.login, root

    def posttrain(self, *words: str, code: int = 0) -> str:
        return self.slurm(str(POSTTRAIN), *words, code=code)

    def status(self, *words: str) -> dict[str, dict]:
        shown = json.loads(self.posttrain("status", *words, "--root", str(self.root), "--json"))
        assert shown["notes"] == []
        return {run["run"]: run for run in shown["runs"]}

    def send(self, name: str, script: str, *options: str, record: bool = True) -> tuple[Path, str]:
        """A run folder as `submit` leaves it, with a job of its own."""
        folder = self.root / name
        (folder / "logs").mkdir(parents=True)
        (folder / "config.yaml").write_text("name: run\n")
        (folder / "job.sbatch").write_text(script)
        rows = [{"step": i, "train/loss": 2.5, "time_s": 2.0 * i} for i in range(30, 41)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "logs" / "plan.json").write_text('{"total_steps": 100}')
        output = f"{folder}/logs/slurm-%j.log"
        words = ["sbatch", "--parsable", f"--chdir={folder}", "-t", "10", "-o", output, *options]
        job = self.slurm(*words, str(folder / "job.sbatch")).strip()
        if record:
            self.note(folder, job)
        return folder, job

    def note(self, folder: Path, job: str) -> None:
        job_file = {"system": "slurm", "id": job, "submitted": "2026-01-01T00:00:00+00:00"}
        (folder / "job.json").write_text(json.dumps(job_file))

    def wait_for(self, name: str, *states: str) -> dict:
        end = time.monotonic() + 30
        while (run := self.status(name)[name])["state"] not in states:
            assert time.monotonic() < end, run
            time.sleep(0.2)
        return run


@pytest.fixture
def login(cluster, tmp_path):
    return Login(cluster, tmp_path / "outputs")


def test_runs_of_a_real_queue(login):
    both = ("-N", "2", "--exclusive")
    obeys, job = login.send("obeys", OBEYS, *both)
    login.wait_for("obeys", "running")
    _, waiting = login.send("waits", DEAF, *both)
    array, tasks = login.send("trials/trial-000", DEAF, *both, "--array=0-1%1")
    login.note(array, f"{tasks}_0")
    login.wait_for("waits", "requeued")  # it has steps of before, and waits

    seen = login.status()
    run = seen["obeys"]
    assert (run["job"], run["step"], run["total_steps"], run["run_left_s"]) == (job, 40, 100, 120)
    assert 540 < run["job_left_s"] <= 600
    assert run["nodes"] == "node[1-2]"
    assert seen["waits"]["reason"] in ("Resources", "Priority")
    assert seen["trials/trial-000"]["job"] == f"{tasks}_0"
    assert seen["trials/trial-000"]["reason"]
    assert list(login.status(tasks)) == ["trials/trial-000"]

    # By its job alone, from a folder that knows nothing of the run.
    found = json.loads(login.posttrain("status", job, "--root=/nowhere", "--json"))["runs"]
    assert [each["run"] for each in found] == [str(obeys)]
    missing = login.posttrain("status", "99999", "--root", str(login.root), code=1)
    assert "99999: is the job of no run below" in missing
    assert "Slurm does not know it" in missing

    root = ("--root", str(login.root))
    said = login.posttrain("cancel", "obeys", "waits", "trials", *root)
    # Those that wait go first, for they would start where the first one ends.
    # One that ends at once is told of in one line, else in two.
    named = dict.fromkeys(line.split(": ")[0] for line in said.splitlines())
    assert list(named) == ["waits", "trials/trial-000", "obeys"]
    assert f"waits: job {waiting} cancelled; it was pending" in said
    assert f"job {tasks}_0 cancelled" in said
    assert "obeys: saved at step 40" in said
    assert (obeys / "STOP").read_text().strip() == "cancel"
    assert login.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T") == "FAILED\n"
    after = login.status()
    assert {name: each["state"] for name, each in after.items()} == {
        "obeys": "saved",
        "waits": "cancelled",
        "trials/trial-000": "cancelled",
    }
    login.slurm("scancel", tasks)

    # One that does not listen is ended by Slurm; one that was queued again waits for its start.
    _, deaf = login.send("deaf", DEAF)
    _, again = login.send("again", DEAF)
    login.wait_for("deaf", "running")
    login.wait_for("again", "running")
    login.slurm("scontrol", "requeue", again)
    requeued = login.wait_for("again", "requeued")
    assert (requeued["restarts"], requeued["reason"]) == (1, "BeginTime")
    said = login.posttrain("cancel", deaf, *root, "--grace", "1")
    assert "deaf: still there after 1 s: its job is ended" in said
    assert login.status("deaf")["deaf"]["state"] == "cancelled"


@pytest.mark.slow
def test_a_job_of_another_user_is_not_ours_to_end(login):
    _, job = login.send("run", OBEYS)
    login.wait_for("run", "running")
    as_nobody = "import os; from posttrain_launch.batch.queue import cancel_job; "
    as_nobody += f"os.setgid(65534); os.setuid(65534); cancel_job('{job}')"
    said = login.slurm(str(POSTTRAIN.with_name("python")), "-c", as_nobody, code=1)
    assert f"Slurm refuses to end job {job}" in said
