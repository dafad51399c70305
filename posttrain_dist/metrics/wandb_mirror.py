"""The process that mirrors metrics.jsonl to W&B, the only file that imports wandb.

`python -m posttrain_dist.metrics.wandb_mirror RUN_FOLDER`, started by `WandbSink`:

    online?  ask the server (a few seconds)  ->  wandb.init  ->  follow metrics.jsonl until stdin
    ends  ->  finish. Where online fails, at its start or later, this process begins again offline,
    with the whole history.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import ssl
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from posttrain_dist.files import RowFollower, read_object
from posttrain_dist.files.temporary import make_temporary, remove_abandoned
from posttrain_dist.logs import notify

ANSWER_S = 5.0  # for the server to answer at all
START_S = 60.0  # for W&B to be online; nobody waits for it
ENDED_START_S = 8.0  # the same once the training has ended
FINISH_S = 30.0  # for what is not uploaded when the training has ended
POLL_S = 1.0


def main() -> None:
    """Mirror the run of a folder until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--offline", metavar="REASON", help="why it is not online")
    given = parser.parse_args()
    environment = dict(os.environ)  # W&B adds to it
    remove_abandoned()
    temporary = make_temporary("wandb")
    # wandb makes folders as it is imported, and its service others; a killed one leaves them.
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    try:
        reason = _mirror(given.run_folder, read_object(given.run_folder / "logs" / "wandb.json"),
                         given.offline)  # fmt: skip
    finally:
        _kill_service()
        shutil.rmtree(temporary, ignore_errors=True)
    sys.stdout.flush()
    if reason is not None:
        # In a new process: W&B's service keeps the id of a run that failed.
        module = ["-P", "-m", "posttrain_dist.metrics.wandb_mirror", str(given.run_folder)]
        os.execve(sys.executable, [sys.executable, *module, "--offline", reason], environment)
    os._exit(0)  # W&B's exit hooks wait for the service


def _mirror(run_folder: Path, settings: dict[str, Any], offline: str | None) -> str | None:
    """Mirror to the end; why to begin again offline, None if all is done."""
    ended = _end_of_input()
    online = settings["mode"] == "online" and offline is None
    try:
        run = _start_online(settings, run_folder, ended) if online else _start(settings, run_folder)
    except Exception as error:
        if online:
            return _cause(error)
        notify(run_folder, f"W&B is off: {_cause(error)}; metrics.jsonl has every number")
        return None
    sync = shlex.join(["wandb", "sync", str(Path(run.settings.sync_dir))])
    if offline is not None:
        send = f"send it later with: {sync}"
        notify(run_folder, f"W&B is not online ({offline}); the run is kept offline, {send}")
    try:
        _follow(run, run_folder, settings, ended)
        run.finish()
        _stop_service()
    except TimeoutError:
        notify(run_folder, f"W&B did not take everything; send the rest: {sync}")
    except Exception as error:
        if online:
            return _cause(error)
        notify(run_folder, f"W&B stopped: {_cause(error)}; metrics.jsonl has every number")
    return None


# ---------------------------------------------------------------------------------- start


def _start_online(settings: dict[str, Any], run_folder: Path, ended: threading.Event) -> Any:
    """The W&B run, online, within limits.

    Raises:
        Exception: what W&B raised, or TimeoutError.
    """
    result: list[Any] = []

    def attempt() -> None:
        try:
            if fault := server_fault(base_url()):
                raise ConnectionError(fault)
            result.append(_start(settings, run_folder, online=True))
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    limit, shortened = time.monotonic() + START_S, False
    while thread.is_alive() and time.monotonic() < limit:
        thread.join(0.1)
        if ended.is_set() and not shortened:
            limit, shortened = min(limit, time.monotonic() + ENDED_START_S), True
    if not result:
        raise TimeoutError(f"{base_url()} does not answer")
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _start(settings: dict[str, Any], run_folder: Path, *, online: bool = False) -> Any:
    """Begin the W&B run.

    Raises:
        Exception: of wandb; OSError: its folder cannot be written.
    """
    folder = run_folder / "wandb"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass  # wandb would go to a temporary folder by itself, where nobody looks
    import wandb

    run = wandb.init(
        mode="online" if online else "offline",
        project=settings["project"],
        entity=settings["entity"],
        group=settings["group"],
        id=settings["id"],
        name=settings["name"],
        dir=str(run_folder),
        config=settings["details"],
        resume="allow" if online and settings["start_step"] else None,
        settings=wandb.Settings(
            x_disable_meta=True,
            x_disable_stats=True,
            save_code=False,
            silent=True,
            console="off",
            init_timeout=START_S,
            finish_timeout=FINISH_S,
            finish_timeout_raises=True,
        ),
    )
    _supersede(folder, Path(run.settings.sync_dir), online)
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def base_url() -> str:
    """The server that this user's W&B talks to."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def server_fault(url: str) -> str | None:
    """Why the server at `url` is of no use now; None: it answers."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S):
            return None
    except urllib.error.HTTPError as error:
        return f"{url} answers with error {error.code}" if error.code >= 500 else None
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLError):
            return None  # W&B has certificates of its own
        if isinstance(cause, TimeoutError):
            return f"{url} does not answer within {ANSWER_S:.0f} s"
        return f"{url} cannot be reached: {getattr(cause, 'strerror', None) or cause}"
    except Exception as error:
        return f"{url} does not speak HTTP: {type(error).__name__}"


# --------------------------------------------------------------------------------- follow


def _follow(run: Any, run_folder: Path, settings: dict[str, Any], ended: threading.Event) -> None:
    """Log the rows of metrics.jsonl, those of before first, until the training has ended."""
    follower = RowFollower(run_folder / "metrics.jsonl")
    # The server has one history step for each row that it took before.
    already = run.starting_step
    while True:
        last = ended.is_set()  # before the look, so that the last row is seen
        for row in follower.read():
            if already and row["step"] <= settings["start_step"]:
                already -= 1
            else:
                run.log(row)
        if last:
            return
        ended.wait(POLL_S)


def _supersede(folder: Path, current: Path, online: bool) -> None:
    """Move what earlier starts left aside: the current one has it all, or adds to the server's."""
    patterns = ["offline-run-*"] if online else ["offline-run-*", "run-*"]
    older = [path for pattern in patterns for path in folder.glob(pattern) if path != current]
    aside = folder / "superseded"
    for path in older:
        aside.mkdir(exist_ok=True)
        taken = len(list(aside.glob(f"{path.name}*")))  # names go by the second
        path.replace(aside / (f"{path.name}-{taken}" if taken else path.name))


# ----------------------------------------------------------------------------------- end


def _end_of_input() -> threading.Event:
    """Set when stdin ends: the training has ended, or its process has died."""
    ended = threading.Event()

    def wait() -> None:
        while os.read(0, 1024):
            pass
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    return ended


def _stop_service() -> None:
    """Let W&B's service write the end of its file, which it does after `finish`."""
    import wandb

    wandb.teardown()


def _kill_service() -> None:
    """End W&B's service, a child of ours: one that still tries to upload would go on for hours."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                pid = int(entry.parent.name)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _cause(error: BaseException) -> str:
    """One line of what went wrong."""
    details = getattr(error, "errors", None)  # pydantic's, one for each setting
    if callable(details) and (found := details()):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in found)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    main()
