"""status, logs and cancel of jobs of a real Ray: the jobs are shell, no training."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from ray_cluster import ray_cluster
from ray_runs import wait_until

POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"
pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEND = """
import sys
from pathlib import Path
from posttrain_launch.ray import remote
from posttrain_launch.run.job_record import new_record, write_job
api, folder, script = sys.argv[1:]
request = remote.request_to_run(api, "run", "/bin/sh", ["-c", script])
remote.submit(request)
write_job(Path(folder), new_record("ray", request.job_id, api))
"""
HELLO = "echo hello from the driver; while :; do sleep 0.2; done"
OBEYS = """until [ -e {0}/STOP ]; do sleep 0.2; done
echo '{{"outcome": "stopped", "step": 4, "total_steps": 9}}' >{0}/logs/outcome.json
exit 130"""


def test_jobs_of_ray_are_looked_at_and_ended_as_those_of_slurm(tmp_path):
    root = tmp_path / "outputs"
    with ray_cluster(jobs=True) as cluster:
        cluster.start_head("--num-cpus=2")

        def posttrain(*words: str) -> str:
            command = [POSTTRAIN, *words, f"--root={root}"]
            done = subprocess.run(
                command, env=cluster.environment(), capture_output=True, text=True, timeout=100
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        def states() -> dict[str, str]:
            runs = json.loads(posttrain("status", "--json"))["runs"]
            return {run["run"]: run["state"] for run in runs}

        def send(name: str, script: str, made: str) -> Path:
            folder = root / name
            (folder / "logs").mkdir(parents=True)
            words = [sys.executable, "-c", SEND, cluster.api, folder, script]
            subprocess.run(words, env=cluster.environment(), check=True, timeout=100)
            (folder / made).touch()  # sent.yaml: the run folder itself is on the cluster
            return folder

        elsewhere = send("elsewhere", HELLO, "sent.yaml")
        send("done", "exit 0", "sent.yaml")
        obeys = send("obeys", OBEYS.format(shlex.quote(str(root / "obeys"))), "config.yaml")
        (obeys / "metrics.jsonl").write_text('{"step": 4, "train/loss": 1.5, "time_s": 1}\n')
        running = {"elsewhere": "running", "done": "finished", "obeys": "running"}
        wait_until(lambda: states() == running, 60)
        assert "hello from the driver" in posttrain("logs", str(elsewhere))
        assert "obeys: saved at step 4" in posttrain("cancel", "obeys")
        assert "cancelled; it was running" in posttrain("cancel", "elsewhere")
        assert states() == {"elsewhere": "cancelled", "done": "finished", "obeys": "saved"}
