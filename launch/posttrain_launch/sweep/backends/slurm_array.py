"""`hydra/launcher=slurm_array`: the trials as tasks of one job array, number = array index.

Each task is the job of a whole run, of any number of nodes, and comes back by the life cycle of
every job. Trials whose jobs ask for different things (cluster.nodes=1,2) are arrays of their own.
The sweep's process only looks: ended or killed, it leaves the jobs as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_dist.config import RunConfig, Slurm
from posttrain_dist.files import write_atomic
from posttrain_launch.batch.array import ArrayQueue, render_array
from posttrain_launch.batch.submit import sbatch
from posttrain_launch.failures import FAILED, STOPPED
from posttrain_launch.run.job_record import new_record, write_job
from posttrain_launch.sweep.folder import Sweep, Trial
from posttrain_launch.sweep.states import code_of_last_start, was_stopped


def restore(sweep: Sweep, options: Mapping[str, Any], *, debug: bool = False) -> SlurmArray:
    """The backend of a sweep."""
    return SlurmArray(sweep, at_once=options["at_once"], waits=options["wait"])


class SlurmArray:
    """Trials that Slurm runs.

    Args:
        at_once: tasks of an array that run at a time; None: all that Slurm has room for.
        waits: whether the sweep's process stays until they have ended.
    """

    slots = None
    retries = 0  # the job of a trial is queued again by its own life cycle

    def __init__(self, sweep: Sweep, *, at_once: int | None, waits: bool) -> None:
        self._sweep, self._at_once, self.waits = sweep, at_once, waits
        self._queue = ArrayQueue(sweep.folder)
        self._folders: dict[int, Path] = {}

    def start(self, trials: Sequence[Trial]) -> None:
        """Submit those that no job in the queue drives."""
        self._folders |= {trial.number: trial.folder for trial in trials}
        # Also of a driver that was killed right after it had submitted them.
        queued = self._queue.tasks()
        for trial in trials:
            if trial.number in queued:
                write_job(trial.folder, new_record("slurm", queued[trial.number].id))
        by_script: dict[str, list[Trial]] = {}
        for trial in trials:
            if trial.number not in queued:
                by_script.setdefault(self._script(trial, []), []).append(trial)
        for group in by_script.values():
            self._submit(group)

    def _submit(self, trials: list[Trial]) -> None:
        numbers = [trial.number for trial in trials]
        script = self._sweep.folder / f"array-{numbers[0]:03d}.sbatch"
        write_atomic(script, self._script(trials[0], numbers))
        script.chmod(0o755)
        job = sbatch(script)
        for trial in trials:
            write_job(trial.folder, new_record("slurm", f"{job}_{trial.number}"))
        print(f"submitted array {job}: {len(trials)} trials", flush=True)
        print(f"  state:   squeue --job {job}", flush=True)
        print(f"  cancel:  scancel {job}", flush=True)

    def _script(self, trial: Trial, numbers: list[int]) -> str:
        text = (trial.folder / "config.yaml").read_text(encoding="utf-8")
        config = RunConfig.from_yaml(text)
        assert isinstance(config.cluster, Slurm)  # trial_run has checked it as for `submit`
        return render_array(config, self._sweep.name, self._sweep.folder, numbers, self._at_once)

    def running(self) -> set[int]:
        """Those that have a job in the queue."""
        return set(self._queue.tasks()) & set(self._folders)

    def code(self, number: int) -> int | None:
        """What the job's driver left; a job that was ended before that has failed."""
        folder = self._folders[number]
        if was_stopped(folder):
            return STOPPED
        found = code_of_last_start(folder)
        return FAILED if found is None else found

    def stop(self) -> None:
        """Leave the jobs alone: Slurm watches them."""
        print("the jobs go on; this process only looked at them", flush=True)

    def close(self) -> None:
        """There is nothing to free."""
