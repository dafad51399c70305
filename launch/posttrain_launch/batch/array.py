"""One job array for many frozen runs: the job script of a run, whose folder the index names."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain_dist.config import RunConfig, Slurm
from posttrain_dist.errors import ClusterError
from posttrain_launch.batch.job_options import options, signal_lead
from posttrain_launch.batch.job_script import arrays, lead_line, script, variables

# Two lines, so that a printf that fails is not masked by the export.
RUN = """''
POSTTRAIN_RUN=$(printf "%s/trial-%03d" "$POSTTRAIN_SWEEP" "$SLURM_ARRAY_TASK_ID")"""
TIMEOUT_S = 30.0  # of squeue


def render_array(
    config: RunConfig,
    name: str,
    sweep_folder: Path,
    numbers: Sequence[int],
    at_once: int | None = None,
) -> str:
    """The text of the job script.

    Args:
        config: of one of the runs; what their jobs ask for is the same.
        name: of the array.
        sweep_folder: holds the run folders trial-000, trial-001, ...
        numbers: of the runs.
        at_once: tasks that run at a time; None: no limit.
    """
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    folders = [sweep_folder / f"trial-{number:03d}" for number in numbers]
    lead_s, source = max((signal_lead(config, folder) for folder in folders), default=(0.0, ""))
    log = str(sweep_folder).replace("%", "%%") + "/trial-%3a/logs/slurm-%A_%a.log"
    changes = {"array": index_list(numbers, at_once), "output": log}
    header = options(name, cluster, sweep_folder, lead_s=lead_s, changes=changes)
    names = variables(config, sweep_folder)
    names = {
        "POSTTRAIN_SWEEP": names.pop("POSTTRAIN_RUN"),
        "POSTTRAIN_RUN": RUN,
        # Not SLURM_JOB_ID, which of the last task is that of the whole array.
        "POSTTRAIN_JOB": '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
        **names,
    }
    words = arrays(config, sweep_folder)
    # The logs of its steps have relative names.
    words["site_setup"] = ['cd "$POSTTRAIN_RUN"', *words["site_setup"]]
    return script(header, names, words, lead_line(cluster, lead_s, source))


def index_list(numbers: Sequence[int], at_once: int | None) -> str:
    """The value of --array: `0-5%2` of 0 to 5, `1,3,5` where there are gaps."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if at_once is None else f"{text}%{at_once}"


class ArrayQueue:
    """The tasks in Slurm's queue that belong to a sweep: known by the folder that they begin in.

    A controller that does not answer changes nothing of what was known.
    """

    def __init__(self, sweep_folder: Path) -> None:
        self._folder = sweep_folder
        self._known: dict[int, Task] | None = None

    def tasks(self) -> dict[int, Task]:
        """Index -> task, of every one that waits, runs or is just ending.

        Raises:
            ClusterError: there is no squeue here, or nothing was known and it does not answer.
        """
        program = shutil.which("squeue")
        if program is None:
            raise ClusterError(
                "there is no squeue on this machine",
                where="hydra/launcher",
                fix="go on with the sweep on a login node of the cluster",
            )
        command = [program, "--noheader", "--array", "--me", "--format=%F|%K|%T|%Z"]
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", check=True, timeout=TIMEOUT_S
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            if self._known is None:
                said = str(error.stderr or error).strip()
                fix = "wait until it does: what is in the queue must not be submitted twice"
                raise ClusterError(
                    f"Slurm does not answer: {said}", where="squeue", fix=fix
                ) from error
            return self._known
        self._known = {}
        for line in done.stdout.splitlines():
            job, index, state, folder = line.split("|", 3)
            if folder == str(self._folder) and index.isdigit():
                self._known[int(index)] = Task(f"{job}_{index}", state != "PENDING")
        return self._known


@dataclass(frozen=True, slots=True)
class Task:
    """A task of an array in the queue."""

    id: str  # "1234_5"
    has_begun: bool
