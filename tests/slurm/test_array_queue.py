"""The backend of arrays on a real Slurm, with runs that only imitate a training."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from posttrain_launch.run.job_record import read_job
from posttrain_launch.sweep import loop as loops
from posttrain_launch.sweep.backends import slurm_array
from posttrain_launch.sweep.backends.slurm_array import SlurmArray
from posttrain_launch.sweep.combinations import restore
from posttrain_launch.sweep.folder import State, Sweep, Trial, write_sweep
from posttrain_launch.sweep.results import read_results
from slurm_cluster import SCRIPT, missing

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
RUN = Path(__file__).parents[1] / "workers" / "imitated_run.py"


class Imitated(SlurmArray):
    """Its script runs an imitation in place of a job of several nodes."""

    def _script(self, trial: Trial, numbers: list[int]) -> str:
        folder = self._sweep.folder
        listed = ",".join(map(str, numbers))
        return (
            f"#!/bin/bash\n#SBATCH --array={listed}%2\n#SBATCH --chdir={folder}\n"
            f"#SBATCH --output={folder}/trial-%3a/slurm-%A_%a.log\n#SBATCH --mem=100\n"
            f'exec {sys.executable} {RUN} "$(printf "%s/trial-%03d" {folder} '
            '"$SLURM_ARRAY_TASK_ID")"\n'
        )


def freeze(trial: Trial) -> None:
    given = dict(text.split("=") for text in trial.overrides)
    trial.folder.mkdir()
    content = {"steps": 3, "values": [float(given["lr"])] * 3, "step_s": 0.3,
               "fails": int(given.get("fails", 0))}  # fmt: skip
    (trial.folder / "config.yaml").write_text(json.dumps(content))


def test_tasks_are_found_again_and_submitted_once(cluster, tmp_path, monkeypatch):
    # The programs of Slurm, as they are where the controller can be reached.
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "squeue"):
        login = f"bash {SCRIPT} {cluster.folder} login {shutil.which(name)}"
        script = f'#!/bin/bash\nexec {login} "$@"\n'
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    monkeypatch.setattr(loops, "POLL_S", 0.1)
    monkeypatch.setattr(slurm_array, "GRACE_S", 0.5)  # all is on one file system
    trials = [["lr=1"], ["lr=2", "fails=1"], ["lr=3"], ["lr=4"]]
    search = {"kind": "basic", "trials": trials}
    sweep = Sweep(folder=tmp_path / "sweep", name="s", command="c", created="t", cwd="/",
                  backend={"kind": "slurm_array"}, search=search)  # fmt: skip
    write_sweep(sweep)

    def drive(*, waits: bool) -> dict[int, State]:
        backend = Imitated(sweep, at_once=2, waits=waits)
        return loops.Loop(sweep, backend, restore(sweep), freeze, print).run()

    states = drive(waits=False)
    assert set(states.values()) <= {State.waiting, State.running}
    jobs = [read_job(folder).id for folder in sorted(sweep.folder.glob("trial-*"))]
    assert [job.partition("_")[2] for job in jobs] == ["0", "1", "2", "3"]
    shown = {row["number"]: row["state"] for row in read_results(sweep)["trials"]}
    assert set(shown.values()) <= {"waiting", "running", "done", "failed"}
    assert shown[3] == "waiting"  # two at a time

    # As if the driver had been killed before it kept the jobs.
    for folder in sweep.folder.glob("trial-*"):
        (folder / "job.json").unlink()
    states = drive(waits=True)
    assert states == {0: State.done, 1: State.failed, 2: State.done, 3: State.done}
    assert len(list(sweep.folder.glob("array-*.sbatch"))) == 1
    for number, expected in enumerate(jobs):
        folder = sweep.folder / f"trial-{number:03d}"
        assert (folder / "starts").read_text() == "start\n"
        kept = read_job(folder)
        assert kept is None or kept.id == expected  # None: it had ended by then
    assert read_job(sweep.folder / "trial-003").id == jobs[3]
    results = read_results(sweep)
    assert [row["number"] for row in results["trials"]] == [0, 1, 2, 3]
    assert results["best"] == 0
