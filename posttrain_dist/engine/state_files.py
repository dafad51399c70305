"""Files of a saved state are opened here alone: tensors and plain values come out, no code runs.

A pickle can name any function and have it called. torch's `weights_only` reader calls none but
those that rebuild tensors; what else DeepSpeed writes is of the three DEEPSPEED_TYPES.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from posttrain_dist import dist
from posttrain_dist.errors import CheckpointError, PosttrainError, is_out_of_memory

STEP = "step"  # key of a plain state: the updates that it has had
# What a ZeRO checkpoint holds beside tensors and plain values; all three only hold data.
DEEPSPEED_TYPES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# Read by torch at every load: the first makes all of them plain, the second would undo it.
FORCE, UNDO = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _StandIn:
    """In the place of a DeepSpeed type, where a file is opened and nothing is done with it."""

    def __init__(self, *values: object) -> None:
        pass


@contextmanager
def without_code(types: Sequence[Any]) -> Iterator[None]:
    """Every `torch.load` in here, a library's too, makes tensors, plain values and `types` only."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, UNDO)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(list(types)):
            yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def read_state(
    path: Path,
    device: torch.device | str = "cpu",
    *,
    mmap: bool = False,
    types: Sequence[Any] = (),
) -> Any:
    """The content of one file of a saved state.

    Args:
        mmap: leave tensors in the file until they are used.
        types: as `torch.serialization.safe_globals` takes them.

    Raises:
        CheckpointError: it cannot be opened, or holds something that no checkpoint does.
        OSError: the file cannot be read.
    """
    mmap = mmap and zipfile.is_zipfile(path)
    try:
        with without_code(types):
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # whatever a reader stumbles over in foreign bytes
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"does not open as tensors and plain values: {_first_line(error)}",
            where=str(path),
            fix="use another checkpoint; this file was damaged, or is not one of a run",
        ) from error


def step_of_file(path: Path) -> int | None:
    """Open a file of a saved state, of whatever engine; the updates that its state has had.

    None: the file does not say. Tensors are not read.

    Raises:
        CheckpointError: it cannot be opened, or holds something that no checkpoint does.
        OSError: the file cannot be read.
    """
    state = read_state(path, mmap=True, types=[(_StandIn, name) for name in DEEPSPEED_TYPES])
    if not isinstance(state, dict):
        raise CheckpointError("is no saved state", where=str(path), fix="use another checkpoint")
    step = state.get(STEP, state.get("global_steps"))  # the latter is DeepSpeed's
    return step if isinstance(step, int) else None


@contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Whatever fails in here fails because the state in `folder` is not of this model.

    Raises:
        CheckpointError: it failed.
    """
    try:
        yield
    except PosttrainError:
        raise
    except Exception as error:
        if dist.is_connection_error(error) or is_out_of_memory(error):
            raise  # another rank is gone, or this one has no room
        raise CheckpointError(
            f"its state does not fit this model: {_first_line(error)}",
            where=str(folder),
            fix="resume with the same model.path and tuning, or use train.resume=never",
        ) from error


def _first_line(error: Exception) -> str:
    # torch first explains how to load such a file anyway, which is what must not be done.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    line = next((line for line in lines if "nsupported" in line or "Unpickler" in line), lines[0])
    line = line.rpartition("WeightsUnpickler error: ")[2].partition(" was not an allowed")[0]
    return f"{type(error).__name__}: {line[:200]}"
