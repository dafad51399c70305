"""Follows a Slurm job to its end: `posttrain submit --wait`.

`sbatch --wait` would look every 32 s only, and knows nothing of FINISHED.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from posttrain_dist.errors import ClusterError
from posttrain_launch.batch.refusals import never_starts
from posttrain_launch.lifecycle.exit_codes import Exit

_TIMEOUT_S = 60.0  # of one question to Slurm
_SEEN_S = 5.0  # until a network file system shows here what a node wrote
_GONE = "GONE"  # it has left the queue, MinJobAge after its end
# Of a job that is not at its end.
_LIVE = {
    *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"),
    *("COMPLETING", "RESIZING", "PREEMPTED"),
    *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"),
}


@dataclass(frozen=True, slots=True)
class JobState:
    """Of one job, or of the array that it is."""

    state: str  # of Slurm: PENDING, RUNNING, COMPLETED, ...
    why: str = ""  # a job that waits, or that failed

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in _LIVE


def job_state(job_id: str) -> JobState:
    """What the queue says of a job.

    Raises:
        ClusterError: Slurm gives no answer.
    """
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T|%r"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _no_answer(str(error)) from error
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise _no_answer(done.stderr.strip().replace("\n", "; "))
    rows = [line.partition("|") for line in done.stdout.splitlines() if line.strip()]
    states = [JobState(state, "" if why == "None" else why) for state, _, why in rows]
    live = [each for each in states if each.is_live]
    return (live or states or [JobState(_GONE)])[0]


def follow(job_id: str, run_folder: Path, every_s: float = 2.0) -> int:
    """Print what becomes of a job until it has ended; a Ctrl-C leaves the job running.

    Returns:
        0: the run has FINISHED; else the exit code of the job, or 130 after Ctrl-C.
    """
    try:
        return _follow(job_id, run_folder, every_s)
    except KeyboardInterrupt:
        run = shlex.quote(str(run_folder))
        print(f"\njob {job_id} goes on; its state: squeue --job {job_id}")
        print(f"  cancel:  scancel {job_id}")
        print(f"  run:     {run}  (done when it holds FINISHED)")
        return Exit.stopped


def _follow(job_id: str, run_folder: Path, every_s: float) -> int:
    said, silent = "", False
    while True:
        try:
            state = job_state(job_id)
            silent = False
        except ClusterError as error:  # of a controller that is started again, for instance
            if not silent:
                print(f"{_now()} {error.what}; asking again", flush=True)
            silent = True
            time.sleep(every_s)
            continue
        line = state.state + (f" ({state.why})" if state.why else "")
        if line != said and state.state != _GONE:
            print(f"{_now()} job {job_id}: {line}", flush=True)
            said = line
            cure = never_starts(state.why) if state.state == "PENDING" else None
            if cure:
                fix = cure.fix.format(job=job_id)
                print(f"  it never starts so; fix: {cure.key}: {fix}; scancel {job_id}", flush=True)
        if not state.is_live:
            return _ended(job_id, run_folder, state)
        time.sleep(every_s)


def _ended(job_id: str, run_folder: Path, state: JobState) -> int:
    end = time.monotonic() + (_SEEN_S if state.state == "COMPLETED" else 0)
    while not (is_finished := (run_folder / "FINISHED").is_file()) and time.monotonic() < end:
        time.sleep(0.2)
    if is_finished:
        print(f"finished: {run_folder}")
        return Exit.finished
    log = run_folder / "logs" / f"slurm-{job_id}.log"
    code = exit_code(job_id)
    print(f"job {job_id} has ended without FINISHED: {state.state}, exit code {code}")
    if not log.is_file():
        print(f"  it wrote no {log}: output_root must be on storage that its nodes see")
        return code
    for line in _last_errors(log):
        print(f"  {line}")
    print(f"  log:   {log}")
    print(f"  again: posttrain submit {shlex.quote(str(run_folder))}")
    return code


def _last_errors(log: Path) -> list[str]:
    """The errors of the last start in the job's log, else its last lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    begins = [i for i, line in enumerate(lines) if re.search(r"\] job \S+, start ", line)]
    lines = lines[begins[-1] :] if begins else lines
    errors = [line for line in lines if "error:" in line or " fix: " in line]
    return (errors or lines)[-5:]


def exit_code(job_id: str) -> int:
    """The exit code of a job that has ended without success; 1 where Slurm knows none."""
    done = subprocess.run(
        ["scontrol", "show", "job", "-o", job_id],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=_TIMEOUT_S,
    )
    found = re.findall(r"\bExitCode=(\d+):(\d+)", done.stdout)
    code, signal = map(int, found[-1]) if found else (0, 0)
    # 53, of no signal, is Slurm's own for a job that could not be launched.
    return code or (128 + signal if 0 < signal < 32 else Exit.failed)


def _no_answer(text: str) -> ClusterError:
    return ClusterError(
        f"Slurm gives no answer: {text}", where="squeue", fix="see `scontrol ping`, and try again"
    )


def _now() -> str:
    return time.strftime("[%H:%M:%S]")
