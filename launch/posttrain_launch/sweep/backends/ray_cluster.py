"""The driver's side of a sweep's Ray: a process that holds it open and says what is free.

This process imports no ray and has no connection to it, as the driver of a run.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from posttrain_dist.errors import ClusterError
from posttrain_dist.files.temporary import remove_temporary
from posttrain_launch.ray import temp_folder
from posttrain_launch.ray.child import end_session, quiet_environment
from posttrain_launch.sweep.backends.packing import Bundle


class RayCluster:
    """A Ray that trials are started on.

    Args:
        environment: variables of every process that goes to it; the token of a Ray of our own.
    """

    def __init__(
        self,
        child: subprocess.Popen[str],
        log: Path,
        environment: dict[str, str],
        temp_dir: Path | None,
    ) -> None:
        self._child, self._log, self._temp_dir = child, log, temp_dir
        self.environment = environment
        self.address: str = self._answer()["address"]
        self._state: dict[str, Any] = {}
        self.look()

    @classmethod
    def join_or_start(cls, sweep_folder: Path, address: str | None) -> RayCluster:
        """Go to a running Ray, or start one on this machine.

        Args:
            address: of the running one; None: there is none.

        Raises:
            ClusterError: it does not answer, or none can be started.
        """
        log = sweep_folder / "ray.log"
        command = [sys.executable, "-P", "-m", "posttrain_launch.sweep.backends.ray_resources"]
        environment, temp_dir = {}, None
        if address is None:
            # Of our own, behind a token that only our trials have; as a run's own Ray.
            environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            environment |= {"RAY_prestart_worker_first_driver": "0"}
            if sys.platform == "linux":
                environment |= {"GLOO_SOCKET_IFNAME": "lo"}
            temp_dir = temp_folder.make(sweep_folder)
            command += ["--temp-dir", str(temp_dir)]
        else:
            command += ["--address", address]
        own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with log.open("ab") as errors:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # a line asks for a look; its end says that we died
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                env={**own, **quiet_environment(), **environment},
                start_new_session=True,
            )
        try:
            return cls(child, log, environment, temp_dir)
        except BaseException:
            _end(child, temp_dir)
            raise

    def look(self) -> None:
        """Ask what there is now."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write("\n")
            self._child.stdin.flush()
        except OSError as error:
            raise self._lost() from error
        self._state = self._answer()

    @property
    def nodes(self) -> list[Bundle]:
        """What each node has in all, as of the last look."""
        return list(self._state["nodes"])

    @property
    def free(self) -> Bundle:
        """What nobody holds, of all nodes together, as of the last look."""
        return dict(self._state["free"])

    def close(self) -> None:
        """Leave the Ray; one of our own ends."""
        _end(self._child, self._temp_dir)

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise self._lost()
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ClusterError(found["error"], where=found["where"], fix=found["fix"])
        return found

    def _lost(self) -> ClusterError:
        return ClusterError(
            "the Ray of this sweep is lost",
            where=str(self._log),
            fix="read that log; started again, the sweep goes on",
        )


def _end(child: subprocess.Popen[Any], temp_dir: Path | None) -> None:
    end_session(child)
    if temp_dir is not None:
        remove_temporary(temp_dir)
