"""The data set that comes with the package: where it lies, and proof that it is the one we mean."""

from __future__ import annotations

import hashlib
from pathlib import Path

from posttrain_dist.errors import DataError

FOLDER = Path(__file__).parents[1] / "assets" / "embedded"
FIXED_CHANNELS = ("arithmetic", "count", "extract", "reverse", "sort")  # one right answer each
OPEN_CHANNELS = ("docstring", "describe")  # real text, from Python's standard library
CHANNELS = FIXED_CHANNELS + OPEN_CHANNELS
# Of its preferences: right against plausibly wrong, and concise against verbose.
PREFERENCE_CHANNELS = (*FIXED_CHANNELS, "concise")
SHA256 = {
    "train": "ae64c3deaf5165a1425190cb056e27e538509f03b6d57035b7278a268d57fa91",
    "heldout": "e6df8305065dbd53c3da3cbb1dc8e6ee57c14b4ee1d7ae05bfba58adfd06ad1b",
    "preferences_train": "f1e0a5c42f600ee14544d0e4d4f5b5a723fb0b6711d530b3f8fafd6438372254",
    "preferences_heldout": "84139b6270a2577db8038d0a373e50ff99ab5b67f843362ced94ef724b0ca236",
}


def split_path(split: str, folder: Path = FOLDER) -> Path:
    """The JSONL file of "train", "heldout", or "preferences_" and either of them.

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
