"""study.journal: what Optuna knows, a line an event, synced before it counts.

A kill, or a power cut, may leave a part of the last line. Optuna still reads such a file, but
appends to it behind that part, and what it appends is lost with it. So the part is cut off before
the file is opened; what it would have said is proposed, or taken in, once more.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from posttrain_dist.errors import PosttrainError

FILE = "study.journal"


class _HeldAlready(JournalFileOpenLock):
    """No lock: the driver of the sweep holds `sweep.lock`, which a kill frees.

    Optuna's own locks are files that a kill leaves behind, for which the next driver would wait.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return


def cut_torn_line(path: Path) -> int:
    """Cut off what stands behind the last line end of a file; the number of bytes."""
    if not path.is_file():
        return 0
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return len(content) - whole


def open_study(folder: Path, direction: Any) -> optuna.Study:
    """The study of a sweep's folder, made where there is none.

    Args:
        direction: minimize or maximize.

    Raises:
        PosttrainError: the file holds something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = folder / FILE
    cut_torn_line(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Optuna calls experimental
            storage = JournalStorage(
                JournalFileBackend(str(path), lock_obj=_HeldAlready(str(path)))
            )
            with contextlib.suppress(KeyError):
                return optuna.load_study(study_name=folder.name, storage=storage)
            return optuna.create_study(study_name=folder.name, storage=storage, direction=direction)
    except (ValueError, KeyError, AssertionError) as error:
        raise PosttrainError(
            f"is no journal of a study: {error}",
            where=str(path),
            fix="move it away and start a new sweep; the trials keep their run folders",
        ) from error
