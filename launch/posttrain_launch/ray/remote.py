"""Ray's job API: a run whose driver is a job of the cluster, and outlives whoever sent it.

submit  the job of a run; state, stop, tail follow it by its record (`run/job_record.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import secrets
import shlex
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from posttrain_dist.errors import ClusterError, PosttrainError
from posttrain_launch.lifecycle.exit_codes import Exit
from posttrain_launch.ray.token import refusal, use_given_token
from posttrain_launch.run.job_record import JobRecord

State = Literal["pending", "running", "finished", "failed", "stopped", "lost"]
STOP_WITHIN_S = 1800  # for a run that is stopped to save, before Ray kills it; its default is 3
RECONNECT_S = 120.0  # that a cluster may be out of reach while its job is followed
_CLIENT = ("requests", "aiohttp", "pydantic")  # what ray[default] brings for it


@dataclass(frozen=True, slots=True)
class RayState:
    """What Ray says of a job.

    Attributes:
        state: lost: Ray ended it, because its node or its head is gone.
        reason: in Ray's words; may be empty.
        exit_code: of the driver, or what follows from the state; None: it has not ended.
    """

    state: State
    reason: str = ""
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent to Ray."""

    address: str  # "http://host:8265"
    entrypoint: str  # one line of shell
    environment: dict[str, str]
    job_id: str  # begins with the name of the run

    def lines(self) -> str:
        """As text, for a dry run."""
        shown = [f"{name}={value}" for name, value in self.environment.items()]
        return "\n".join([f"to {self.address}", f"run {self.entrypoint}", *shown])


def request_to_run(address: str, name: str, program: str, arguments: list[str]) -> Request:
    """The job that runs `posttrain` with these arguments on the cluster."""
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WITHIN_S)}
    job_id = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    return Request(address, shlex.join([program, *arguments]), environment, job_id)


def submit(request: Request) -> None:
    """Send a job. Ray starts it whatever becomes of this process.

    Raises:
        ClusterError: the cluster cannot be reached or refuses, or its client is not installed.
    """
    with _said_clearly(request.address):
        _client(request.address).submit_job(
            entrypoint=request.entrypoint,
            submission_id=request.job_id,
            runtime_env={"env_vars": request.environment},
        )


def state(record: JobRecord) -> RayState:
    """How a job stands.

    Raises:
        ClusterError: the cluster cannot be reached, or knows no such job.
    """
    with _said_clearly(_address(record), record.id):
        found = _client(_address(record)).get_job_info(record.id)
    status, code = str(found.status.value), found.driver_exit_code
    reason = " ".join((found.message or "").split())
    if status in ("PENDING", "RUNNING"):
        return RayState("pending" if status == "PENDING" else "running", reason)
    if status == "SUCCEEDED":
        return RayState("finished", reason, int(Exit.finished))
    if status == "STOPPED":
        return RayState("stopped", reason, int(Exit.stopped))
    if code is None:
        return RayState("lost", reason, int(Exit.requeue))
    if code in (127, 126):  # of the shell that was to start it
        reason = "there is no `posttrain` on the cluster's PATH: set cluster.program to its path"
    return RayState("failed", reason, code)


def stop(record: JobRecord) -> bool:
    """Have the run save and end; returns at once. False: it had ended already.

    Raises:
        ClusterError: the cluster cannot be reached, or knows no such job.
    """
    with _said_clearly(_address(record), record.id):
        return bool(_client(_address(record)).stop_job(record.id))


def tail(record: JobRecord, follow: bool = False) -> Iterator[str]:
    """What the driver has printed, in pieces of one or more lines; with `follow` to its end.

    A connection that breaks is made again for two minutes.

    Raises:
        ClusterError: the cluster cannot be reached, or knows no such job.
    """
    address = _address(record)
    if not follow:
        with _said_clearly(address, record.id):
            yield _client(address).get_job_logs(record.id)
        return
    shown, deadline = 0, time.monotonic() + RECONNECT_S
    while True:
        try:
            with _said_clearly(address, record.id):
                begin = shown
                for piece in _pieces(_client(address).tail_job_logs(record.id)):
                    new = piece[max(0, begin) :]
                    begin -= len(piece)
                    if new:
                        shown += len(new)
                        deadline = time.monotonic() + RECONNECT_S
                        yield new
                if state(record).exit_code is not None:
                    return
        except ClusterError:
            if time.monotonic() > deadline:
                raise
        time.sleep(1.0)


def _pieces(following: AsyncGenerator[str]) -> Iterator[str]:
    """An asynchronous iterator as a plain one."""
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(following))
            except StopAsyncIteration:
                return
    finally:
        with contextlib.suppress(Exception):
            loop.run_until_complete(following.aclose())
        loop.close()


# ------------------------------------------------------------------------------- the client


def _address(record: JobRecord) -> str:
    if record.address is None:
        raise ClusterError(
            f"the record of the job {record.id} has no address of Ray's job API",
            where="job.json",
            fix="submit the run again",
        )
    return record.address


def _client(address: str) -> Any:
    missing = [name for name in _CLIENT if importlib.util.find_spec(name) is None]
    if missing:
        raise ClusterError(
            f"the client of Ray's job API is not installed (no {', '.join(missing)})",
            where="posttrain submit cluster=ray",
            fix="pip install 'posttrain-dist[jobs]', or pip install 'ray[default]'",
        )
    use_given_token()  # before ray is imported, which looks at it once
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


@contextlib.contextmanager
def _said_clearly(address: str, job_id: str | None = None) -> Iterator[None]:
    """Turn what the client raises into one error: Ray has RuntimeErrors with pages of HTTP."""
    try:
        yield
    except PosttrainError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        where = f"cluster.address={address}"
        if (refused := refusal(text, where)) is not None:
            raise refused from error
        if job_id is not None and ("404" in text or "does not exist" in text):
            raise ClusterError(
                f"knows no job {job_id}",
                where=where,
                fix="the cluster was started again since, or it is another: submit the run again",
            ) from error
        if isinstance(error, OSError) or "Failed to connect" in text:
            raise ClusterError(
                "no job API of Ray answers there",
                where=where,
                fix="give http://HOST:8265 of the head (its dashboard); from outside, first "
                "`ssh -L 8265:localhost:8265 HEAD`, or kubectl port-forward",
            ) from error
        raise ClusterError(
            f"Ray's job API failed: {text[:300]}",
            where=where,
            fix="read the dashboard's log on the head, session_latest/logs/dashboard.log",
        ) from error
