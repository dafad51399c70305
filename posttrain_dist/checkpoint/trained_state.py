"""The state of a small tuning: what is trained, by parameter name, in one safetensors file.

`trained.safetensors` holds for each trained parameter its float32 master under the parameter's
name, `NAME::exp_avg`, `NAME::exp_avg_sq` and `NAME::step` beside it, and every other tensor that
the tuning keeps. Nothing in it depends on engine, number of ranks or dtype: a 16-bit parameter is
its master, rounded. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from posttrain_dist import dist
from posttrain_dist.checkpoint.manifest import TRAINED
from posttrain_dist.errors import CheckpointError
from posttrain_dist.files import DigestWriter, FileDigest

if TYPE_CHECKING:
    import torch

    from posttrain_dist.engine.base import TrainEngine

_PART = "::"  # between a parameter's name and what of its state a tensor is
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class Kept(Protocol):
    """A tuning, as far as its state is concerned."""

    whole_model: ClassVar[bool]

    def kept(self, name: str) -> bool:
        """Whether a tensor of this name is part of the state of a small tuning."""


def state_writer(
    engine: TrainEngine, tuning: Kept, step: int
) -> Callable[[Path], Mapping[str, FileDigest]]:
    """What writes the state of `step` below a folder: of a whole model in the engine's own files,
    of a small tuning what is trained, by name.
    """
    if tuning.whole_model:
        return engine.save_state
    return lambda folder: save_trained(engine, tuning.kept, step, folder)


def save_trained(
    engine: TrainEngine, kept: Callable[[str], bool], step: int, folder: Path
) -> dict[str, FileDigest]:
    """Write `trained.safetensors`; collective, rank 0 writes.

    Args:
        kept: of the tuning: which tensors, by name.

    Returns:
        Its digest; nothing on the other ranks.
    """
    tensors: dict[str, torch.Tensor] = {}
    keep = dist.rank() == 0

    def add(name: str, tensor: torch.Tensor) -> None:
        if keep:
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()

    trained = set()
    for name, state in engine.named_state():
        trained.add(name)
        for key, tensor in state.items():
            add(name if key == "master" else f"{name}{_PART}{key}", tensor)
    for name, tensor in engine.full_tensors(lambda name: kept(name) and name not in trained):
        add(name, tensor)
    if not keep:
        return {}
    with DigestWriter(folder / TRAINED) as file:
        _write(file, tensors, {"step": str(step), "format": "pt"})
    return {TRAINED: file.digest}


def load_trained(engine: TrainEngine, kept: Callable[[str], bool], folder: Path) -> None:
    """Read what `save_trained` wrote, in whatever layout; collective.

    Raises:
        CheckpointError: the file holds other tensors than this model has.
    """
    with open_tensors(folder / TRAINED) as file:
        parts: dict[str, list[str]] = {}
        for name in file.keys():  # noqa: SIM118  no mapping
            parts.setdefault(name.partition(_PART)[0], []).append(name)
        trained = {name for name, _ in engine.local_state(lambda name: True, moments=False)}
        others = engine.full_tensors(lambda name: kept(name) and name not in trained)
        frozen = {name for name, _ in others}
        _compare(set(parts), trained | frozen, folder / TRAINED)

        def get(name: str) -> dict[str, torch.Tensor]:
            return {
                part.partition(_PART)[2] or "master": file.get_tensor(part) for part in parts[name]
            }

        engine.load_full_tensors({name: file.get_tensor(name) for name in frozen})
        engine.load_named_state(get, int(file.metadata()["step"]))


def read_kept(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that the tuning keeps, from the state of a checkpoint; trained ones in float32.

    Args:
        folder: `state/` of the checkpoint.
    """
    with open_tensors(folder / TRAINED) as file:
        return {name: file.get_tensor(name) for name in file.keys() if _PART not in name}  # noqa: SIM118


def step_of_tensors(path: Path) -> int | None:
    """Open such a file and look at each tensor; the updates that its state has had.

    None: the file does not say.

    Raises:
        CheckpointError: it cannot be opened, or a tensor is not finite.
        OSError: the file cannot be read.
    """
    with open_tensors(path) as file:
        for name in file.keys():  # noqa: SIM118  no mapping
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise CheckpointError(
                    f"holds {name} with values that are not finite",
                    where=str(path),
                    fix="use another checkpoint",
                )
        step = (file.metadata() or {}).get("step", "")
    return int(step) if step.isdecimal() else None


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """An open safetensors file: `keys`, `get_tensor`, `metadata`.

    Raises:
        CheckpointError: it is none.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"does not open as tensors: {error}",
            where=str(path),
            fix="use another checkpoint; this file was damaged, or is not one of a run",
        ) from error
    with opened as file:
        yield file


def _compare(there: set[str], wanted: set[str], path: Path) -> None:
    if there == wanted:
        return
    missing, more = sorted(wanted - there), sorted(there - wanted)
    lists = [f"{len(n)} {what}: {', '.join(n[:3])}" for what, n in _named(missing, more) if n]
    raise CheckpointError(
        f"holds another tuning: {'; '.join(lists)}",
        where=str(path),
        fix="resume with the same model.path and tuning, or use train.resume=never",
    )


def _named(missing: list[str], more: list[str]) -> list[tuple[str, list[str]]]:
    return [("of this run are not in it", missing), ("in it are not of this run", more)]


def _write(file: Any, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """The format of safetensors, in order: its own writer takes a path only, which no digest sees.

    Wide elements come first, so that each tensor begins at a multiple of its own.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name, tensor in ((name, tensors[name]) for name in order):
        start, end = end, end + tensor.nbytes
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        file.write(tensors[name].reshape(-1).view(torch.uint8).numpy())
