"""Where our own log lines and notices go, and output that cannot fail.

log_to_file(path)            what our packages log, to the log of the rank
notify(run_folder, text)     one line for whoever watches the run
unfailing_output()           prints that cannot be written are left out and stop nothing
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

ProgressCallback = Callable[[int, int], None]  # (parts done, parts in all)

LOGGERS = ("posttrain_dist", "posttrain_kernels")
NOTICES = Path("logs", "notices.jsonl")  # in a run folder; the driver shows each new row's text

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append what our packages log, from INFO on, to `path` while the context lasts.

    A line that the disk refuses is left out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.StreamHandler(unfailing(path.open("a", encoding="utf-8")))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = [(logger, logger.level) for logger in map(logging.getLogger, LOGGERS)]
    for logger, _ in before:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()
        handler.stream.close()


def notify(run_folder: Path, text: str) -> None:
    """Log `text`, and have the driver of the run show it on the terminal; never raises."""
    _log.warning("%s", text)
    with contextlib.suppress(OSError), (run_folder / NOTICES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 0, "text": text}) + "\n")


# ------------------------------------------------------------------------- output that cannot fail


class UnfailingStream:
    """A text stream whose writes never raise: what cannot be written is left out.

    A pipe whose reader has gone, a terminal that hung up or a full disk must not end a training
    for the sake of a line of output. Everything but writing is that of the wrapped stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = False  # nobody reads any more

    def write(self, text: str) -> int:
        """Write `text`; characters that the encoding does not have are written as escapes."""
        if self.lost:
            return len(text)
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._discard(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, as far as that can be done."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._discard(error)

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        with contextlib.suppress(OSError):
            self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self, error: Exception) -> None:
        """Empty the buffer, which else fails again at the next write or as the process ends."""
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        self.lost = not full  # a disk may have room again
        try:
            place = self._stream.fileno()
            kept = os.dup(place)
        except (OSError, ValueError):
            return
        inherited = os.get_inheritable(place)
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), place, inheritable=inherited)
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
        if full:
            os.dup2(kept, place, inheritable=inherited)
        os.close(kept)


def unfailing(stream: TextIO) -> TextIO:
    """`stream` with writes that never raise; see `UnfailingStream`."""
    if isinstance(stream, UnfailingStream):
        return stream
    return cast(TextIO, UnfailingStream(stream))


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """Standard output and error that never raise, while the context lasts."""
    # A process that was started with them closed (`>&-`) has None in their place.
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        unfailing(stream or Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  to the end
        for stream in before
    )
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
