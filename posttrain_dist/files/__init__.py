"""Files and folders that are written whole or not at all, their digests, and growing files.

write_atomic(path, text)                one file
commit_folder(partial_of(path), path)   a folder, once all in it is written
DigestWriter(path)                      a file whose digest is made while it is written
LineFile(path, lines)                   a file that grows while a run trains
RowFollower(path)                       reads such a file while it grows
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


# ------------------------------------------------------------------------------ atomic writes


def write_atomic(path: Path, text: str, *, to_disk: bool = False) -> None:
    """Write `text` beside `path` and rename it into place: a reader sees the old or the new file.

    Args:
        to_disk: wait until the content is on the disk, so that it outlives a power cut.
    """
    # Two processes may write the same file (a report, say), each beside it under its own name.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        if to_disk:
            sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if to_disk:
        sync(path.parent)


def partial_of(folder: Path) -> Path:
    """Where the content of `folder` is written before `commit_folder`: beside it, on its disk."""
    return folder.with_name(folder.name + ".partial")


def commit_folder(partial: Path, folder: Path, *, replace: bool = False) -> None:
    """Give a written folder its name: all of it is on the disk before, the name comes at once.

    Args:
        replace: remove an older `folder`; without it, only an empty one may be there.

    Raises:
        OSError: `folder` is there and not empty, or the disk refuses.
    """
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    older = folder.with_name(folder.name + ".replaced")
    if replace:
        shutil.rmtree(older, ignore_errors=True)  # of a process that was killed here
        if folder.exists():
            folder.rename(older)
    partial.rename(folder)
    sync(folder.parent)
    if replace:
        shutil.rmtree(older, ignore_errors=True)


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} where there is no file."""
    values: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return values


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------ digests


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What tells whether a file is as it was written: a guard against damage, not forgery."""

    bytes: int
    xxh3_128: str  # of the content, hexadecimal


class DigestWriter(io.BufferedWriter):
    """A new file whose digest is made while it is written, in order; on the disk once closed.

    with DigestWriter(path) as file:
        torch.save(state, file)
    file.digest
    """

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path, "w")
        super().__init__(self._file)
        self._hash = xxhash.xxh3_128()
        self._bytes = 0
        self._fault: OSError | None = None

    @property
    def digest(self) -> FileDigest:
        """Of what was written so far."""
        return FileDigest(self._bytes, self._hash.hexdigest())

    def write(self, content: ReadableBuffer, /) -> int:
        """Append all of `content`.

        Raises:
            OSError: the disk refused. The context raises it too, whatever its caller made of it:
                torch.save makes a RuntimeError "unexpected pos" of a full disk.
        """
        try:
            written = super().write(content)
        except OSError as error:
            self._fault = error
            raise
        self._hash.update(content)
        self._bytes += written
        return written

    def seekable(self) -> bool:
        """No: what is written over would be in the digest."""
        return False

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Refused."""
        raise io.UnsupportedOperation("a DigestWriter is written in order")

    def fileno(self) -> int:
        """Refused: torch's older format would write to the file itself."""
        raise io.UnsupportedOperation("a DigestWriter is written through `write` alone")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # again what the disk refused
            self.close()
        if self._fault is not None and isinstance(error, Exception) and error is not self._fault:
            raise self._fault from error

    def close(self) -> None:
        """Wait until the content is on the disk, then close."""
        try:
            if not self.closed:
                self.flush()
                os.fsync(self._file.fileno())
        finally:
            super().close()


def digest_of(path: Path) -> FileDigest:
    """The digest of a file, read in bounded memory."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, xxhash.xxh3_128)
        return FileDigest(stream.tell(), found.hexdigest())


# ------------------------------------------------------------------------------- growing files


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl; a torn last line, left by a kill, is passed over."""
    return _parse(saved_bytes(path))


class RowFollower:
    """Reads the rows that are appended to a growing file, such as metrics.jsonl, each once."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def skip(self) -> None:
        """Pass over what stands in the file now."""
        self._offset = self._path.stat().st_size if self._path.is_file() else 0

    def read(self) -> list[dict[str, Any]]:
        """The rows since the last call; one that is still being written comes with the next."""
        try:
            with self._path.open("rb") as stream:
                # A resumed run cuts the rows that it will write again.
                self._offset = min(self._offset, os.fstat(stream.fileno()).st_size)
                stream.seek(self._offset)
                data = stream.read()
        except OSError:  # not there yet, or just being replaced
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return _parse(whole)


def _parse(data: bytes) -> list[dict[str, Any]]:
    """The lines that are whole: JSON objects with a step."""
    rows = []
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class LineFile:
    """A text file that a run appends lines to while it trains: no line stops the training.

    - A line that the disk refuses (full, quota, immutable) stays in memory, and goes to the disk
      before the next line, or when the file is closed.
    - A file that was removed or replaced meanwhile is written again, from the one still open.
    - What is refused to the end goes to `<name>.unwritten` beside the file, where the disk takes
      it; `saved_bytes` finds it there, and a later LineFile that begins with that keeps it.

    Args:
        path: of the file, which is replaced by one with `lines`, given without their line ends.
        on_fault: called with the error when lines begin to be refused.

    Raises:
        OSError: the file cannot be written even now.
    """

    def __init__(
        self, path: Path, lines: Iterable[str], on_fault: Callable[[OSError], None] = lambda _: None
    ) -> None:
        self.path, self._on_fault = path, on_fault
        self._pending = bytearray()
        self._refused = False
        write_atomic(path, "".join(f"{line}\n" for line in lines))
        _unwritten_of(path).unlink(missing_ok=True)
        self._file = self._open()

    def append(self, line: str) -> None:
        """Add a line; it is with the operating system on return, or kept."""
        self._pending += f"{line}\n".encode()
        try:
            self._write()
            self._refused = False
        except OSError as error:
            if not self._refused:
                self._refused = True
                self._on_fault(error)

    def close(self) -> None:
        """Write what is left and close.

        Raises:
            OSError: the disk still refuses.
        """
        try:
            self._write()
        except OSError:
            with contextlib.suppress(OSError):
                lost = b"" if self._is_there() else self._content()
                _unwritten_of(self.path).write_bytes(lost + self._pending)
            raise
        finally:
            os.close(self._file)

    def _open(self) -> int:
        # Without a buffer: what was written of a line is known when the rest is refused.
        return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _write(self) -> None:
        self._restore()
        while self._pending:
            del self._pending[: os.write(self._file, self._pending)]

    def _restore(self) -> None:
        """If the path does not name the open file any more, write that one's content there."""
        if self._is_there():
            return
        write_atomic(self.path, self._content().decode("utf-8", "replace"))
        restored = self._open()
        os.close(self._file)
        self._file = restored

    def _is_there(self) -> bool:
        own = os.fstat(self._file)
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)

    def _content(self) -> bytes:
        with os.fdopen(os.dup(self._file), "rb") as stream:
            stream.seek(0)
            return stream.read()


def saved_bytes(path: Path) -> bytes:
    """What a run left of a growing file, with the lines that the file refused; b"" for none."""
    return b"".join(each.read_bytes() for each in (path, _unwritten_of(path)) if each.is_file())


def _unwritten_of(path: Path) -> Path:
    return path.with_name(path.name + ".unwritten")
