"""A real Slurm on this machine, made by tests/slurm/cluster.sh, and the runs sent to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from posttrain_launch.lifecycle import starts
from ray_runs import wait_until

from posttrain_dist.files import read_rows

SCRIPT = Path(__file__).parents[1] / "slurm" / "cluster.sh"
POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")


def missing() -> str | None:
    """Why this machine cannot have such a cluster."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm of namespaces needs root on Linux"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"not installed (Debian: slurm-wlm, munge, iproute2): {', '.join(absent)}"
    if subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True).returncode:
        return "no right to make namespaces (CAP_SYS_ADMIN)"
    return None


class Cluster:
    """A Slurm of some nodes.

    Args:
        folder: of all its state; short, for a socket's path may have 107 bytes only.
        options: for cluster.sh, from the environment.
    """

    def __init__(self, folder: Path, nodes: int, **options: str) -> None:
        self.folder, self._options = folder, options
        self("up", str(nodes))

    def __call__(self, *words: str, code: int = 0, timeout_s: float = 120) -> str:
        environment = {
            **os.environ,
            **self._options,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "TMPDIR": str(self.folder / "tmp"),  # private to each node, as on real ones
        }
        command = ["bash", str(SCRIPT), str(self.folder), *words]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == code, f"{words}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def login(self, *words: str, code: int = 0) -> str:
        """What a command on the login node prints."""
        return self("login", *words, code=code)

    def fault(self, *words: str) -> None:
        """Something goes wrong; see cluster.sh."""
        self("fault", *words)

    def submit(self, *words: str, root: Path) -> tuple[str, Path]:
        """Send a run; its job and its folder."""
        submit = [str(POSTTRAIN), "submit", "cluster=slurm", "cluster.network_interface=eth0"]
        said = self.login(*submit, *words, f"output_root={root}")
        [folder] = (root / "run").iterdir()
        return said.partition("submitted job ")[2].split()[0], folder

    def state(self, job: str) -> str:
        return self.login("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.login("scontrol", "show", "job", "-o", job)))

    def wait_for_state(self, job: str, *states: str, timeout_s: float) -> str:
        return wait_until(lambda: (s := self.state(job)) in states and s, timeout_s)

    def wait(self, condition: Callable[[], object], timeout_s: float, run_folder: Path) -> None:
        """Wait for something of a run; what Slurm and its logs say if it does not come."""
        try:
            wait_until(condition, timeout_s)
        except AssertionError as error:
            raise AssertionError(
                f"{error}\n{self.last_words()}\n{last_words(run_folder)}"
            ) from error

    def last_words(self) -> str:
        """What Slurm says of its jobs and nodes, and how its log ends."""
        said = [
            self.login("squeue", "-t", "all", "-o", "%i %T %r %N %e %S"),
            self.login("sinfo", "-N", "-o", "%n %T %E"),
            (self.folder / "log" / "slurmctld.log").read_text()[-4000:],
        ]
        return "\n".join(said)

    def wait_for_start(self, job: str, number: int, run_folder: Path, timeout_s: float) -> None:
        """Wait for the start of this number, from 1; Slurm's hold of 121 s is lifted.

        Slurm sets the hold only when the last process of the start before has ended.
        """

        def begun() -> bool:
            self.lift_hold_at_end(job)
            return len(starts.read(run_folder)) >= number

        self.wait(begun, timeout_s, run_folder)

    def lift_hold(self, job: str) -> None:
        """Let a job that was queued again start at once, if it is held.

        A job whose time is set again and again never comes to its turn.
        """
        with contextlib.suppress(AssertionError, ValueError):
            eligible = datetime.fromisoformat(self.facts(job)["EligibleTime"])
            if (eligible - datetime.now()).total_seconds() > 5:
                self.login("scontrol", "update", f"JobId={job}", "StartTime=now")

    def lift_hold_at_end(self, job: str) -> None:
        """The same once the last process on any node has ended, as that of one that was cut off.

        What Slurm sends to end them goes by the number of the job: it would end the next start.
        """
        if self.state(job) == "PENDING" and not self.of_jobs():
            self.lift_hold(job)

    def processes(self) -> dict[int, str]:
        """Everything alive that was started for this cluster or in it: pid -> command."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                if str(self.folder).encode() in environment + command:
                    found[int(folder.name)] = command.decode(errors="replace")
        return found

    def of_jobs(self) -> list[str]:
        """Commands of the processes that jobs have left on the nodes."""
        words = ("gcs_server", "raylet", "ray::", "posttrain", "srun", "slurmstepd")
        return [each for each in self.processes().values() if any(word in each for word in words)]

    def wait_for_no_process(self, run_folder: Path) -> None:
        """Slurm counts a job as ended a moment before the last daemon of a step ends."""
        try:
            self.wait(lambda: not self.of_jobs(), 30, run_folder)
        except AssertionError as error:
            raise AssertionError(f"left on the nodes: {self.of_jobs()}") from error


def step_of(run_folder: Path) -> int:
    """The newest step that a run has logged."""
    return max((row["step"] for row in read_rows(run_folder / "metrics.jsonl")), default=0)


def losses(run_folder: Path) -> dict[int, float]:
    rows = read_rows(run_folder / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def digest_of_export(run_folder: Path) -> str:
    """Of the weights that a finished run exported."""
    files = sorted((run_folder / "export").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def last_words(run_folder: Path) -> str:
    logs = sorted((run_folder / "logs").glob("*.log"))
    return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs)
