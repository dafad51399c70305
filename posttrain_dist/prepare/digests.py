"""SHA-256 of files, remembered as long as size, time and inode of a file are the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path

from posttrain_dist.errors import DataError
from posttrain_dist.files import write_atomic

_SETTLED_S = 2.0  # a file changed later than this before it was hashed may change unnoticed
_MOST = 10_000  # files that are remembered


def state(file: Path) -> tuple[int, int, int]:
    """What changes with the content: size, time of the last change, inode.

    Raises:
        DataError: it is not there.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return found.st_size, found.st_mtime_ns, found.st_ino


class Digests:
    """Hashes each file once; `save` keeps what was found for the next time.

    Args:
        store: a JSON file; one that is not there or cannot be read is an empty one.
    """

    def __init__(self, store: Path) -> None:
        self._store, self._changed = store, False
        self._known: dict[str, tuple[list[int], str]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            self._known = dict(json.loads(store.read_bytes()))

    def of(self, file: Path) -> str:
        """The digest of a file, in hexadecimal digits.

        Raises:
            DataError: it cannot be read.
        """
        file = file.absolute()
        now = list(state(file))
        known = self._known.get(str(file))
        if known is not None and known[0] == now:
            return known[1]
        try:
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(file, error) from error
        if time.time() - now[1] / 1e9 > _SETTLED_S:
            self._known.pop(str(file), None)
            self._known[str(file)] = (now, found)  # the newest at the end
            self._changed = True
        return found

    def save(self) -> None:
        """Write what was found, where that can be done."""
        if not self._changed:
            return
        newest = dict(list(self._known.items())[-_MOST:])
        with contextlib.suppress(OSError):
            self._store.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._store, json.dumps(newest))


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot be read: {error.strerror}", where=str(file), fix="check its permissions"
    )
