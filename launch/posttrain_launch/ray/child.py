"""The driver's side of a Ray run: start the Ray job as a child, wait, clean up, raise its failure.

The driver process imports no ray and holds no connection to it, so Ray's noise and signal
handlers stay out of the terminal. The child (`posttrain_launch.ray.job`) lives in a session of its
own: Ctrl-C reaches the driver alone, which asks for a stop through the run folder's STOP file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain_dist.config import Ray, RunConfig, Slurm
from posttrain_dist.errors import ClusterError, ClusterLost, PosttrainError, error_of
from posttrain_dist.files.temporary import remove_temporary
from posttrain_launch.ray import temp_folder
from posttrain_launch.ray.gate import CLOSED, OPEN, set_gate
from posttrain_launch.ray.head_watch import HeadWatch, address_file, leave_training
from posttrain_launch.ray.token import use_given_token

TERM_GRACE_S = 5.0
FROM_SCHEDULER = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def run(config: RunConfig, run_folder: Path, address: str | None = None) -> None:
    """Train on Ray workers and wait for the end, on data that is prepared; see `started`."""
    with started(config, run_folder, address) as job:
        job.finish()


@contextlib.contextmanager
def started(config: RunConfig, run_folder: Path, address: str | None = None) -> Iterator[Job]:
    """A Ray job that comes up, and whose workers start, while the caller prepares the data.

    Args:
        config: the run; `config.cluster` is Ray or Slurm.
        run_folder: shared by all nodes; holds the frozen config.
        address: "host:port" of a running Ray; null: `cluster.address`, else RAY_ADDRESS, else a
            Ray of its own on this machine.

    Yields:
        The job; `finish` lets it train. On leaving, every process of it is ended.

    Raises:
        ClusterError: there is no Ray to go to.
    """
    cluster = config.cluster
    if not isinstance(cluster, Ray):
        raise TypeError(f"ray_driver needs cluster=ray or slurm, not {type(cluster).__name__}")
    address, given_by = _address(cluster, address)
    if isinstance(cluster, Slurm) and not address:
        raise ClusterError(
            "slurm runs inside a Slurm job, and no Ray was started there",
            where="cluster",
            fix="send it with `posttrain submit …`, or train here with cluster=ray",
        )
    log = run_folder / "logs" / "driver.log"
    set_gate(run_folder, CLOSED)
    for stale in (error_file(run_folder), address_file(run_folder)):
        stale.unlink(missing_ok=True)
    temp_dir = None if address else temp_folder.make(run_folder)
    try:
        child = _start_child(run_folder, address, given_by, temp_dir, log)
        try:
            yield Job(child, run_folder, log, joined=bool(address))
        finally:
            end_session(child, at_once=bool(address))
    finally:
        if temp_dir is not None:
            remove_temporary(temp_dir)


@dataclass(frozen=True, slots=True)
class Job:
    """A Ray job that was started."""

    child: subprocess.Popen[bytes]
    run_folder: Path
    log: Path
    joined: bool = False  # a Ray that was there before, and is there afterwards

    def wait_until_joined(self) -> None:
        """Wait for the tie to a Ray that ran before: where there is none, no data need be prepared.

        Raises:
            PosttrainError: there is none, or it refuses us.
        """
        while (code := self.child.poll()) is None:
            if address_file(self.run_folder).is_file():
                return
            time.sleep(0.1)
        failure = self._failure(code)
        if failure is not None:
            raise failure

    def finish(self) -> None:
        """Let it train on the prepared data, and wait for its end.

        Raises:
            PosttrainError: what a worker raised, or a ClusterError that names the rank and the log.
            ClusterLost: the head or a node of Ray is gone; started again, the run goes on.
            KeyboardInterrupt: by the second Ctrl-C.
        """
        set_gate(self.run_folder, OPEN)
        watch = HeadWatch(self.run_folder)
        while (code := self.child.poll()) is None:
            # Short waits, so that a signal handler's exception is seen at once.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(timeout=0.5)
            # A Ray of our own ends with its job: that its head answers no more says nothing.
            if not self.joined:
                continue
            # A job that has failed and cannot leave its Ray need not be waited for.
            if error_file(self.run_folder).exists() and not watch.answers():
                break
            if watch.is_lost():
                leave_training(self.run_folder)
                raise watch.error(self.run_folder)
        failure = self._failure(code)
        if failure is None:
            return
        if self.joined and isinstance(failure, ClusterError) and not watch.answers():
            leave_training(self.run_folder)
            raise watch.error(self.run_folder) from failure
        raise failure

    def _failure(self, code: int | None) -> PosttrainError | None:
        """Why the job ended, or cannot end, unless all went well."""
        if error_file(self.run_folder).exists():
            return read_error(error_file(self.run_folder), self.log)
        if code == 0:
            return None
        assert code is not None, "a job that runs has left no error"
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        # Ray ends a process whose head is lost, without an exception in it.
        error = ClusterLost if self.joined else ClusterError
        return error(
            f"the Ray job ended {ended}",
            where=str(self.log),
            fix="its last lines say what happened",
        )


def _address(cluster: Ray, named: str | None) -> tuple[str | None, str]:
    """The address of a running Ray to use, and what gave it, for an error about it."""
    from_environment = os.environ.get("RAY_ADDRESS")
    for address, given_by in (
        (named, "--address"),
        (cluster.address, "cluster.address"),
        (from_environment, "the environment variable RAY_ADDRESS"),
    ):
        if address:
            return address, given_by
    return None, ""


def error_file(run_folder: Path) -> Path:
    """Where a failed job leaves its error."""
    return run_folder / "logs" / "error.json"


def _start_child(
    run_folder: Path, address: str | None, given_by: str, temp_dir: Path | None, log: Path
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "posttrain_launch.ray.job", str(run_folder)]
    environment = {**os.environ, **quiet_environment()}
    if address:
        command += [f"--address={address}", f"--given-by={given_by}"]
        use_given_token(environment)
    else:
        environment.pop("RAY_ADDRESS", None)
        # In the environment, not in ~/.ray/auth_token: Ray would switch every later
        # `ray start` of this user to token mode by the mere existence of that file.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # Processes kept ready for tasks: Ray Train starts its own, with its environment.
        environment["RAY_prestart_worker_first_driver"] = "0"
    if temp_dir is not None:
        command += ["--temp-dir", str(temp_dir)]
    # What a scheduler sends to all processes of a job is the driver's to hear: it has the run saved
    # and ends this one when that is done.
    left_to_driver = FROM_SCHEDULER if address else ()
    with log.open("ab") as out, _blocked(left_to_driver):
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # never written: its end shows the child that we died
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


@contextlib.contextmanager
def _blocked(numbers: Iterable[int]) -> Iterator[None]:
    """What is started inside does not get these signals, from its first moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def quiet_environment() -> dict[str, str]:
    """Variables for every process of a run: no telemetry, no progress bars, no coloured logs."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
        # Workers print to their own log, not through Ray's logger.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        # No Prometheus counters, and no watcher actor: Slurm's signals announce a preemption.
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # Seconds between looks at the workers; the default of 2 delays the end of a short run.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }


# ------------------------------------------------------------------------------- the end


def session_members(session: int) -> list[int]:
    """Processes of the session that `session` leads, without the leader (Linux)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:  # after the name, which may hold spaces: state, parent, group, session
            fields = entry.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(entry.parent.name)
        if pid != session and int(fields[3]) == session and fields[0] != "Z":
            found.append(pid)
    return found


def kill_members(session: int) -> None:
    """Kill what the leader of `session` started: its Ray, in process groups of its own."""
    deadline = time.monotonic() + TERM_GRACE_S
    # Until none is there: one that was just being started is not in the list before.
    while (members := session_members(session)) and time.monotonic() < deadline:
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def end_session(child: subprocess.Popen[bytes], *, at_once: bool = False) -> None:
    """End the child and all that it started (its own Ray): TERM, a grace, then KILL.

    Args:
        at_once: KILL; a Ray that it joined ends what the child had there.
    """
    if child.poll() is None and not at_once:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=TERM_GRACE_S)
    if child.poll() is None:
        child.kill()
        child.wait()  # before the look at its session: it starts no more processes now
    kill_members(child.pid)
    if child.stdin is not None:
        child.stdin.close()


# ------------------------------------------------------------------------- errors as JSON


def read_error(file: Path, log: Path) -> PosttrainError:
    """The error in `logs/error.json`, as the class that it was."""
    try:
        return error_of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as broken:
        return ClusterError(
            f"the Ray job failed, and its error file cannot be read: {broken}",
            where=str(log),
            fix="its last lines say what happened",
        )


if __name__ == "__main__":  # JOB [TEMP_DIR]: what is left to do for a driver that died
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(sys.argv[1]), signal.SIGKILL)
    kill_members(int(sys.argv[1]))
    for folder in sys.argv[2:]:
        remove_temporary(Path(folder))
