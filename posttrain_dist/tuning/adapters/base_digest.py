"""What tells base models apart: a digest of a model folder that costs seconds at 140 GB.

An adapter on another base than its own loads without an error and answers nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from posttrain_dist.errors import ModelError, reason
from posttrain_dist.models import ModelConfig, Weights
from posttrain_dist.models.folder import INDEX, SINGLE, check_folder, network_of, resolve

# Of every tensor so many stretches of so many bytes are read, at even distances from its first
# bytes to its last: some thousand short reads of a model of 70B.
STRETCHES, STRETCH_BYTES = 8, 64
RANDOM = "random-"  # begins the digest of a model without weight files


class BaseTensor(NamedTuple):
    """Where a tensor of a safetensors file lies."""

    file: Path
    dtype: str  # as the file calls it: BF16, F32, U8
    shape: tuple[int, ...]
    start: int  # in the file
    end: int


def base_digest(folder: Path, *, has_weights: bool = True) -> str:
    """The digest of a base model.

    It is xxh3-128 over: what of config.json decides the network; then, in the order of their
    names, each tensor's name, dtype and shape, and `STRETCHES` stretches of its content. It does
    not depend on how the tensors are spread over files, on the tokenizer or on templates. It is a
    guard against mistakes, not against forgery: a change of a few bytes between the stretches
    stays unseen, a training of all weights does not.

    Args:
        folder: of the base model.
        has_weights: False for `model.weights=random`: then it is of the network alone.

    Raises:
        ModelError, SeveralErrors: the folder cannot be used.
    """
    network = network_of(check_folder(folder, need_weights=has_weights))
    digest = xxhash.xxh3_128(json.dumps(network, sort_keys=True).encode())
    if not has_weights:
        return f"{RANDOM}{digest.hexdigest()}"
    opened: dict[Path, Any] = {}
    try:
        for name, tensor in sorted(base_tensors(folder).items()):
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            file = opened.get(tensor.file)
            if file is None:
                file = opened[tensor.file] = tensor.file.open("rb", buffering=0)
            for place in _places(tensor):
                file.seek(place)
                digest.update(file.read(min(STRETCH_BYTES, tensor.end - place)))
    except OSError as error:
        raise ModelError(
            f"cannot be read: {reason(error)}",
            where=str(error.filename or folder),
            fix="check its permissions, and that its disk is there",
        ) from error
    finally:
        for file in opened.values():
            file.close()
    return digest.hexdigest()


def digest_of_model(model: ModelConfig) -> str:
    """`base_digest` of the model of a run."""
    return base_digest(resolve(model.path), has_weights=model.weights is Weights.load)


def _places(tensor: BaseTensor) -> Iterator[int]:
    """Where its stretches begin: all of it, one after the other, if it is small."""
    room = tensor.end - tensor.start - STRETCH_BYTES
    if room <= STRETCHES * STRETCH_BYTES:
        yield from range(tensor.start, tensor.end, STRETCH_BYTES)
        return
    for i in range(STRETCHES):
        yield tensor.start + room * i // (STRETCHES - 1)


def base_tensors(folder: Path) -> dict[str, BaseTensor]:
    """Every tensor of a model folder that was checked, by name; no content is read."""
    files = [folder / SINGLE]
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    found: dict[str, BaseTensor] = {}
    for file in files:
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = (8 + header_bytes + int(offset) for offset in entry["data_offsets"])
            found[name] = BaseTensor(file, entry["dtype"], tuple(entry["shape"]), start, end)
    return found
