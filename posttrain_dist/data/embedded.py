"""The data set that comes with the package: where it lies, and proof that it is the one we mean."""

from __future__ import annotations

import hashlib
from pathlib import Path

from posttrain_dist.errors import DataError

FOLDER = Path(__file__).parents[1] / "assets" / "embedded"
FIXED_CHANNELS = ("arithmetic", "count", "extract", "reverse", "sort")  # one right answer each
OPEN_CHANNELS = ("docstring", "describe")  # real text, from Python's standard library
CHANNELS = FIXED_CHANNELS + OPEN_CHANNELS
SHA256 = {
    "train": "6930c8899e8619161f662dce3de8649e12e084c4c4819b046cea9729b2b1475f",
    "heldout": "dbeae35c75f11309d702e7dfe571839e66530ad9e9249096cf2c728b08999a38",
}


def split_path(split: str, folder: Path = FOLDER) -> Path:
    """The JSONL file of "train" or "heldout".

    Raises:
        DataError: no such split, the file is not there, or its SHA-256 is not the pinned one.
    """
    if split not in SHA256:
        raise DataError(
            f"the embedded data set has no split {split!r}",
            where="embedded",
            fix=f"use one of {', '.join(SHA256)}",
        )
    path = folder / f"{split}.jsonl"
    reinstall = "install the package again: the file came with it"
    if not path.is_file():
        raise DataError("the file is not there", where=str(path), fix=reinstall)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256[split]:
        raise DataError(
            f"the file was changed: its SHA-256 is {digest}, not {SHA256[split]}",
            where=str(path),
            fix=reinstall,
        )
    return path
