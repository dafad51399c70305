"""A run that Ray drives, looked at from outside: its processes, its logs, its losses."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain_dist.files import read_rows


def small_run(model: Path, rows: Path, root: Path, steps: int = 3) -> list[str]:
    """Of a small training of one process on Ray."""
    return [
        f"model.path={model}",
        f"data.train={rows}",
        f"output_root={root}",
        "data.max_length=64",
        "name=small",
        f"train.steps={steps}",
        "train.batch_size=4",
        "optimizer.lr=0.003",
        "engine=single",
        "cluster=ray",
        "cluster.workers=1",
        "logging.wandb=off",
        "eval.generate_rows=0",
        "checkpoint.export=false",
    ]


def losses(folder: Path) -> list[float]:
    """Of its steps."""
    rows = read_rows(folder / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row]


def processes_of(folder: Path) -> list[int]:
    """Everything that was started for the run: its folder is in the command line or the cwd."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            cwd = str((entry / "cwd").readlink())
            if str(folder).encode() in command or cwd.startswith(str(folder)):
                found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], Any], timeout_s: float) -> Any:
    """What the condition gives as soon as that is true."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def worker_groups_started(folder: Path, size: int) -> int:
    """As Ray Train's controller logged it."""
    [log] = (folder / "ray" / "logs" / "train").glob("ray-train-sys-controller-*.log")
    return log.read_text().count(f"Started training worker group of size {size}")


def actors_of(folder: Path) -> set[str]:
    """Kinds of the actors that the run's own Ray had, each a process of its own."""
    logs = (folder / "ray" / "logs").glob("worker-*.err")
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return {line.removeprefix(":actor_name:") for line in lines if line.startswith(":actor_name:")}


def is_worker(pid: int) -> bool:
    """Whether it is a process of Ray Train that trains."""
    with contextlib.suppress(OSError):
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def listening(pids: list[int]) -> list[tuple[str, str]]:
    """(address, program) of every TCP socket on which one of the processes waits for others."""
    addresses = {}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # listens
                words = bytes.fromhex(fields[1].partition(":")[0])
                raw = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                addresses[f"socket:[{fields[9]}]"] = socket.inet_ntop(family, raw)
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if (link := str(descriptor.readlink())) in addresses:
                        found.append((addresses[link], Path(program).name))
    return found


def ray_folders(pids: list[int]) -> list[Path]:
    """Where the raylet among the processes has its sockets and logs."""
    words = []
    for pid in pids:
        with contextlib.suppress(OSError):
            words += Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    option = "--temp_dir="
    return [Path(word.removeprefix(option)) for word in words if word.startswith(option)]
