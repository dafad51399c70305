"""How an error reaches the user: one message; the trace goes to a log, or is asked for."""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from pathlib import Path
from typing import IO

from posttrain_dist.errors import ConfigError, PosttrainError, SeveralErrors, unwritable
from posttrain_launch.lifecycle.exit_codes import Exit

BAD_CONFIG, FAILED, STOPPED = Exit.bad_config, Exit.failed, Exit.stopped
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # a disk that takes no more


def print_error(
    error: BaseException,
    *,
    debug: bool = False,
    log: Path | None = None,
    err: IO[str] | None = None,
) -> None:
    """Print what went wrong.

    Args:
        debug: print the whole trace too.
        log: a file that takes the trace.
        err: where to print; None: standard error.
    """
    err = err or sys.stderr
    trace = "".join(traceback.format_exception(error))
    if log is not None:
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as stream:
            stream.write(trace)
    if debug:
        print(trace, file=err, end="")
    if isinstance(error, OSError) and error.errno in REFUSED:
        error = unwritable(error.filename or "a file of this run", error)
    if isinstance(error, PosttrainError):
        print(f"error: {error}", file=err, flush=True)
        return
    place = f"the trace is in {log}" if log else "add --debug for the trace"
    what = str(error).strip() or "no message"
    print(f"error: {type(error).__name__}: {what}\n  ({place})", file=err, flush=True)


def is_bad_config(error: BaseException) -> bool:
    """Whether what was typed is at fault, and not a file, a machine or the program."""
    return isinstance(error, ConfigError | SeveralErrors)
