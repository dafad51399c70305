"""A Ray of several nodes on this machine, started as a person would start it by hand.

Each node is a session of its own, so that it can be lost alone; all of them share the machine's
address, its process table and one temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from posttrain_launch.ray.child import kill_members, session_members

RAY = Path(sysconfig.get_path("scripts")) / "ray"


class RayCluster:
    """A head, and nodes that join it.

    Args:
        jobs: with the dashboard, whose job API takes jobs.
    """

    def __init__(self, jobs: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # short, for sockets
        self.token = secrets.token_hex(24)
        self.token_file = self.folder / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(self.token)
        self.address = f"{socket.gethostbyname(socket.gethostname())}:{_free_port()}"
        self.api_port = _free_port()
        self._jobs = jobs
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def api(self) -> str:
        """The address of the job API."""
        return f"http://127.0.0.1:{self.api_port}"

    def environment(self, **changes: str | None) -> dict[str, str]:
        """Of a process that uses the cluster; null takes a variable away."""
        values: dict[str, str | None] = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_AUTH_TOKEN": None,
            "RAY_ADDRESS": None,
            **changes,
        }
        return {name: value for name, value in values.items() if value is not None}

    def start_head(self, *options: str) -> None:
        """The first node, with the control process."""
        port = self.address.rpartition(":")[2]
        dashboard = f"--dashboard-port={self.api_port}" if self._jobs else "--num-gpus=0"
        self._start(
            "--head",
            f"--port={port}",
            f"--include-dashboard={'true' if self._jobs else 'false'}",
            dashboard,
            f"--temp-dir={self.folder}/ray",
            *options,
        )
        if self._jobs:
            wait_for_port(f"127.0.0.1:{self.api_port}")

    def start_node(self, *options: str) -> None:
        """Another node."""
        self._start(f"--address={self.address}", *options)

    def _start(self, *options: str) -> None:
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                [RAY, "start", *options, "--object-store-memory=100000000", "--block"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment(RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0"),
                start_new_session=True,
            )
        self.nodes.append(node)
        end = time.monotonic() + 60
        while "Ray runtime started" not in Path(log.name).read_text():
            assert node.poll() is None and time.monotonic() < end, Path(log.name).read_text()
            time.sleep(0.05)

    def kill_node(self, index: int) -> None:
        """What a power-off does: every process of the node ends at once."""
        self.nodes[index].kill()
        self.nodes[index].wait()
        kill_members(self.nodes[index].pid)

    def kill_control(self) -> None:
        """Of the head, only the process that knows the cluster."""
        for pid in session_members(self.nodes[0].pid):
            with contextlib.suppress(OSError):
                if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                    os.kill(pid, signal.SIGKILL)
                    return
        raise AssertionError("there is no gcs_server")

    def logs(self) -> Path:
        """Ray's own."""
        return self.folder / "ray"

    def end(self) -> None:
        """End all nodes, and remove their folder."""
        for index in reversed(range(len(self.nodes))):
            self.kill_node(index)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def ray_cluster(jobs: bool = False) -> Iterator[RayCluster]:
    """A cluster without nodes yet, whose nodes end with the block."""
    cluster = RayCluster(jobs)
    try:
        yield cluster
    finally:
        cluster.end()


def wait_for_port(address: str, timeout_s: float = 60) -> None:
    """Until something listens there."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < end, f"nothing listens on {address}"
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
