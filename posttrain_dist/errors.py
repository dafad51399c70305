"""The errors a user can fix: each says what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class PosttrainError(Exception):
    """An error caused by input (config, data, files, machine), shown without a stack trace.

    Args:
        what: one sentence that names the fault.
        where: the place: `file:line`, a YAML key, a folder.
        fix: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [f"{where}: {what}" if where else what]
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:  # travels between Ray processes
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(cls: type[PosttrainError], what: str, where: str, fix: str) -> PosttrainError:
    return cls(what, where=where, fix=fix)


class ConfigError(PosttrainError):
    """A value of the configuration is wrong; `where` is its key (`train.batch_size`)."""


class DataError(PosttrainError):
    """A row or file of data is wrong; `where` is `file:line`."""


class ModelError(PosttrainError):
    """A model folder cannot be used; `where` is the folder or file."""


class CheckpointError(PosttrainError):
    """A checkpoint cannot be written, found or used; `where` is its folder."""


class TrainingError(PosttrainError):
    """The training came to nothing; `where` is its step."""


class ClusterError(PosttrainError):
    """Processes, devices or nodes are not there; `where` is the key or address."""


class ClusterLost(ClusterError):
    """Machines that a run had are gone; started again, it goes on. `where` is their address."""


class OutOfMemory(PosttrainError):
    """A device or host has no memory left; `where` is the step, or the rehearsal."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory that could not be had is why `error` was raised; no torch is imported.

    On a GPU torch has a class for it; on a CPU, and where a library asks for memory itself, only
    the text says so.
    """
    seen: list[BaseException] = []
    # An exception may be raised again as the cause of its own cause.
    while error is not None and not any(error is each for each in seen):
        if isinstance(error, PosttrainError):
            return isinstance(error, OutOfMemory)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        text = str(error).lower() if isinstance(error, RuntimeError) else ""
        if any(each in text for each in _NO_MEMORY):
            return True
        seen.append(error)
        error = error.__cause__
    return False


_NO_MEMORY = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed", "bad_alloc")


def reason(error: BaseException) -> str:
    """What went wrong, as the end of a sentence: `no space left on device`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def unwritable(path: Path | str, error: OSError) -> PosttrainError:
    """A file or folder that the machine refuses to write."""
    fixes = {
        errno.ENOSPC: "free space on that disk, or set output_root to another",
        errno.EDQUOT: "remove what you do not need, or set output_root to another disk",
        errno.EFBIG: "raise the limit of a file's size (ulimit -f unlimited)",
        errno.EROFS: "set output_root to a disk that can be written to",
    }
    otherwise = "make the file and its folder writable (chmod; chattr -i), on a disk that works"
    return PosttrainError(
        f"cannot be written: {reason(error)}",
        where=str(path),
        fix=f"{fixes.get(error.errno or 0, otherwise)}; started again, a run goes on from its "
        "newest checkpoint",
    )


def refuse_undecoded(names: Iterable[str]) -> None:
    """Refuse names of files that are no text here: neither JSON nor a page can hold them.

    Raises:
        PosttrainError: one has bytes that are no UTF-8, or that the locale does not decode.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            own = sys.getfilesystemencoding().lower() == "utf-8"
            raise PosttrainError(
                "holds bytes that are no UTF-8" if own else "cannot be read in this locale",
                where=name.encode(errors="surrogateescape").decode(errors="replace"),
                fix="rename it" if own else "set LC_ALL=C.UTF-8, and unset PYTHONUTF8",
            ) from error


class SeveralErrors(PosttrainError):
    """Several faults found in one pass and reported together."""

    def __init__(self, problems: list[PosttrainError]) -> None:
        self.problems = problems
        super().__init__(f"{len(problems)} problems:\n" + "\n".join(f"- {p}" for p in problems))

    def __reduce__(self) -> tuple[object, ...]:
        return SeveralErrors, (self.problems,)


def error_fields(error: PosttrainError, rank: int | None, trace: str) -> dict[str, Any]:
    """A user's error as JSON, as it leaves the process in `logs/error.json`."""
    fields: dict[str, Any] = {"kind": type(error).__name__, "rank": rank, "traceback": trace}
    if isinstance(error, SeveralErrors):
        return {**fields, "problems": [error_fields(each, rank, "") for each in error.problems]}
    return {**fields, "what": error.what, "where": error.where, "fix": error.fix}


def error_of(fields: dict[str, Any]) -> PosttrainError:
    """The error that `error_fields` wrote, as the class that it was.

    Raises:
        KeyError, TypeError: it wrote no such thing.
    """
    if "problems" in fields:
        return SeveralErrors([error_of(each) for each in fields["problems"]])
    kind = globals().get(fields["kind"], ClusterError)
    error: PosttrainError = kind(fields["what"], where=fields["where"], fix=fields["fix"])
    return error


def raise_all(problems: list[PosttrainError]) -> None:
    """Raise nothing, the one problem, or all of them in one SeveralErrors."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise SeveralErrors(problems)


class Rule(NamedTuple):
    """What must hold among values of the configuration; stands beside the group's dataclass."""

    holds: bool
    key: str  # of the configuration
    what: str  # is wrong, as a sentence that follows the key
    fix: str

    def error(self) -> ConfigError:
        """The rule as the error that a configuration which breaks it gets."""
        return ConfigError(self.what, where=self.key, fix=self.fix)


MAX_COUNT = 10**15  # above it no count is meant, and 64 bits would overflow in what is made of it


def at_least(key: str, value: float | None, least: float = 1, most: float = MAX_COUNT) -> Rule:
    """The rule that a value, where it is given, is `least` to `most`; not a number is neither."""
    if value is not None and value > most:
        shown = short(value)
        return Rule(
            False, key, f"is {shown}, must be at most {most:,}", f"set {key} to {most} or less"
        )
    what = f"is {value}, must be at least {least}"
    return Rule(value is None or value >= least, key, what, f"set {key} to {least} or more")


def short(value: object) -> str:
    """A value for a message: a whole number may have hundreds of digits."""
    too_long = isinstance(value, int) and abs(value) >= 10**24
    return "a number of more than 24 digits" if too_long else str(value)
