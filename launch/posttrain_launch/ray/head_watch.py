"""Whether the head of a run's Ray still answers, seen by the driver, which has no tie to it.

The process that holds the tie is of no use here: Ray ends it 61 s after the head is gone, and no
code of ours runs in between. Workers go on training until Ray ends them, so they save before that.
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

from posttrain_dist.errors import ClusterLost
from posttrain_launch.lifecycle.lead import TEARDOWN_S
from posttrain_launch.lifecycle.measured import lead_of

POLL_S = 1.0
CONNECT_TIMEOUT_S = 2.0
# A head may be slow, and one with a store of its own (KubeRay) comes back; Ray itself waits 60 s.
LOST_AFTER_S = 10.0
# For the workers to finish their step and save: what that has taken, while Ray lets them live.
LEAVE_MARGIN_S = 5.0
LEAVE_AT_MOST_S = 45.0


def address_file(run_folder: Path) -> Path:
    """Where the Ray job leaves "host:port" of its head."""
    return run_folder / "logs" / "ray_head"


class HeadWatch:
    """Looks at the head's port from time to time.

    Args:
        run_folder: of the run; the Ray job writes the address there when it has joined.
        lost_after_s: seconds without an answer, after which the head is lost.
    """

    def __init__(self, run_folder: Path, lost_after_s: float = LOST_AFTER_S) -> None:
        self._file = address_file(run_folder)
        self._lost_after_s = lost_after_s
        self._looked = self._answered = time.monotonic()

    def is_lost(self) -> bool:
        """Whether it has not answered for so long; looks once a second at most."""
        now = time.monotonic()
        if now - self._looked >= POLL_S:
            if self.answers():
                self._answered = time.monotonic()
            self._looked = time.monotonic()
        return time.monotonic() - self._answered > self._lost_after_s

    def answers(self) -> bool:
        """Whether it answers now; also as long as no head is known."""
        host, _, port = self.address.rpartition(":")
        if not host:
            return True
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    @property
    def address(self) -> str:
        """ "host:port"; empty: not known yet."""
        with contextlib.suppress(OSError):
            return self._file.read_text(encoding="utf-8").strip()
        return ""

    def error(self, run_folder: Path) -> ClusterLost:
        """What the user is shown."""
        return ClusterLost(
            "the head of Ray does not answer any more",
            where=self.address,
            fix=f"once a cluster is there, `posttrain run {run_folder}` goes on from the newest "
            "checkpoint",
        )


def leave_training(run_folder: Path) -> bool:
    """Have workers that lost their head save and end; whether they did.

    Two trainings of one run at a time would write the same files, so a new one begins after this.
    """
    outcome = run_folder / "logs" / "outcome.json"
    before = _modified(outcome)
    with contextlib.suppress(OSError):
        (run_folder / "STOP").write_text("the head of Ray was lost\n", encoding="utf-8")
    measured_s = lead_of(run_folder)[0] - TEARDOWN_S + LEAVE_MARGIN_S
    deadline = time.monotonic() + min(measured_s, LEAVE_AT_MOST_S)
    while time.monotonic() < deadline:
        if _modified(outcome) != before:
            return True
        time.sleep(0.2)
    return False


def _modified(file: Path) -> int:
    with contextlib.suppress(OSError):
        return file.stat().st_mtime_ns
    return 0
