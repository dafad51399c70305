"""What transformers made of the files of a tokenizer, kept by the digest of these files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from posttrain_dist.files import write_atomic
from posttrain_dist.models.tokenizer.model_tokenizer import ModelTokenizer

FORMAT = 1  # of what is kept: raise it with every change
KEPT_DAYS = 30  # that an entry stays after its last use
_LIBRARIES = ("tokenizers", "transformers")
# Of these, names, sizes and times say whether they changed: they may be large, and no tokenizer is
# made of them.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def cached(
    folder: Path, cache: Path | None, read: Callable[[Path], ModelTokenizer]
) -> ModelTokenizer:
    """The tokenizer that `read` makes of a model folder, or made of the same files before.

    Args:
        folder: of the model.
        cache: folder of the entries; null, or one that cannot be used: it is read again.
    """
    if cache is None:
        return read(folder)
    entry = cache / f"{_digest(folder)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = ModelTokenizer(**json.loads(entry.read_bytes()))
        os.utime(entry)
        return found
    made = read(folder)
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        write_atomic(entry, json.dumps(made.to_json()))
    return made


def _digest(folder: Path) -> str:
    """Of all that decides the tokenizer: any file may be part of it, so all are looked at."""
    from importlib.metadata import version  # not for those who are sent a tokenizer

    found: list[object] = [FORMAT, *(version(name) for name in _LIBRARIES)]
    templates = folder / "additional_chat_templates"
    for file in sorted([*folder.glob("*"), *templates.glob("*")]):
        if not file.is_file():
            continue
        name = str(file.relative_to(folder))
        if file.suffix in _WEIGHTS:
            stat = file.stat()
            found.append([name, stat.st_size, stat.st_mtime_ns])
        else:
            with file.open("rb") as stream:
                found.append([name, hashlib.file_digest(stream, "sha256").hexdigest()])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]


def _sweep(cache: Path) -> None:
    for entry in cache.glob("*.json"):
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime > KEPT_DAYS * 86400:
                entry.unlink()
