"""The nodes of a job meet at the first one: they compare clocks with it and wait for its verdict.

The first node writes logs/nodes/meeting.json, which the others read: where it listens, and a token
for this one meeting. That a node gets so far shows that it sees the run folder and reaches the
first node.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from posttrain_dist.files import read_object, write_atomic
from posttrain_launch.preflight.node_facts import folder_of

LEAVE = "leave"  # the verdict that something is wrong
_FILE = "meeting.json"
_ROUNDS = 5  # the fastest of them has the least error
_POLL_S = 0.05


class NotSeen(Exception):
    """The first node wrote no meeting.json that this node sees."""


class Meeting:
    """Of the first node: answers the others until it is closed."""

    def __init__(self, run_folder: Path, start: str, address: str) -> None:
        self._verdict = LEAVE
        self._decided = threading.Event()
        self._path = folder_of(run_folder) / _FILE
        token = secrets.token_hex(16)
        meeting = self

        class Answer(socketserver.StreamRequestHandler):
            """One node."""

            def handle(self) -> None:
                if not hmac.compare_digest(self.rfile.readline(200).strip(), token.encode()):
                    return
                with contextlib.suppress(OSError):
                    while (word := self.rfile.readline(200)) != b"":
                        answer = meeting.answer(word.decode(errors="replace").strip())
                        self.wfile.write(f"{answer}\n".encode())

        self._server = socketserver.ThreadingTCPServer((address, 0), Answer)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), daemon=True).start()
        port = self._server.server_address[1]
        values = {"start": start, "host": address, "port": port, "token": token}
        self._path.unlink(missing_ok=True)
        write_atomic(self._path, json.dumps(values) + "\n")

    def answer(self, word: str) -> str:
        """What a node hears: the time at once, the verdict when there is one."""
        if word == "time":
            return repr(time.time())
        self._decided.wait()
        return self._verdict

    def decide(self, verdict: str) -> None:
        """Say the verdict to all that wait for it, and to who comes later."""
        self._verdict = verdict
        self._decided.set()

    def __enter__(self) -> Meeting:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._decided.set()
        self._path.unlink(missing_ok=True)
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True, slots=True)
class Clock:
    """How this node's clock compares with the first node's, in seconds."""

    ahead_s: float
    round_trip_s: float


class Guest:
    """Of every other node: its connection to the meeting."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream = connection.makefile("rwb")

    def say(self, word: str) -> str:
        """Send a word; the answer.

        Raises:
            OSError: the first node is gone, or gives no answer in time.
        """
        self._stream.write(f"{word}\n".encode())
        self._stream.flush()
        answer: bytes = self._stream.readline(200)
        if not answer:
            raise ConnectionError("the first node closed the connection")
        return answer.decode().strip()

    def clock(self, now: Callable[[], float] = time.time) -> Clock:
        """Compare clocks, by the round with the shortest way (Cristian, 1989).

        Args:
            now: this node's clock.
        """
        rounds = []
        for _ in range(_ROUNDS):
            before = now()
            there = float(self.say("time"))
            after = now()
            rounds.append(Clock((before + after) / 2 - there, after - before))
        return min(rounds, key=lambda each: each.round_trip_s)


@contextlib.contextmanager
def joined(run_folder: Path, start: str, deadline: float) -> Iterator[Guest]:
    """A connection to the meeting of this start of a job.

    Args:
        deadline: of `time.monotonic`, for finding it and for every answer.

    Raises:
        NotSeen: the first node wrote no meeting.json that is seen here.
        OSError: it cannot be reached.
    """
    values = _find(run_folder, start, deadline)
    left = max(1.0, deadline - time.monotonic())
    address = (values["host"], int(values["port"]))
    with socket.create_connection(address, timeout=min(left, 20.0)) as connection:
        connection.settimeout(left)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(f"{values['token']}\n".encode())
        yield Guest(connection)


def _find(run_folder: Path, start: str, deadline: float) -> dict[str, str]:
    folder = folder_of(run_folder)
    while time.monotonic() < deadline:
        # Listed: see `read_facts`.
        if any(each.name == _FILE for each in folder.iterdir()):
            with contextlib.suppress(OSError):
                values = read_object(folder / _FILE)
                if values.get("start") == start:
                    return values
        time.sleep(_POLL_S)
    raise NotSeen
