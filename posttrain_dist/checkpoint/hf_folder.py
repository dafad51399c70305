"""Write a Hugging Face model folder from a stream of whole tensors, and check it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from posttrain_dist import dist
from posttrain_dist.errors import CheckpointError, reason
from posttrain_dist.files import commit_folder, partial_of

SHARD_BYTES = 4 << 30
# Whatever belongs to a tokenizer or to generation; weights and config.json are written by us.
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip


def write_hf_folder(
    tensors: Iterable[tuple[str, torch.Tensor]],
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype,
    end_token_id: int | None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write weights, config, tokenizer and generation config to `target`.

    Collective: every rank runs through `tensors`, rank 0 writes; never more than one shard is
    held in memory.

    Args:
        tensors: (name, whole tensor); a tensor is copied before the next is asked for.
        source: the model folder that the run started from: tokenizer and config.
        dtype: of the written floating-point weights.
        end_token_id: the token that ends an assistant turn; generation stops at it.

    Raises:
        CheckpointError: a weight is not finite, all weights are zero, or the disk refused.
    """
    partial = partial_of(target)
    main = dist.rank() == 0
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    writer = _ShardWriter(partial, shard_bytes)
    for name, tensor in tensors:
        if main and not (config.get("tie_word_embeddings") and name == "lm_head.weight"):
            with _disk_errors(partial, target):
                writer.add(name, tensor, dtype)
    if main:
        with _disk_errors(partial, target):
            writer.finish()
            _write_config(config, partial, dtype)
            for pattern in COPIED:
                for path in source.glob(pattern):
                    shutil.copyfile(path, partial / path.name)
            _write_generation_config(source, partial, end_token_id)
            commit_folder(partial, target, replace=True)
    dist.barrier()
    return target


@contextlib.contextmanager
def _disk_errors(partial: Path, target: Path) -> Iterator[None]:
    """Turn what a disk refuses into an error for the user; the part written gives its room back."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the model cannot be written: {reason(error)}",
            where=str(target),
            fix="free space on that disk; the checkpoints are as they were: `posttrain export "
            "<run folder>` writes the newest one, to another disk too",
        ) from error


class _ShardWriter:
    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._shards: list[dict[str, int]] = []  # name -> bytes
        self._nonzero = False

    def add(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{name} holds NaN or infinity: the run has diverged",
                where=str(self._folder),
                fix="export an earlier checkpoint, and look at train/grad_norm in the report",
            )
        self._nonzero = self._nonzero or bool(tensor.any())
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        copy = tensor.detach().to("cpu", wanted, copy=True).contiguous()
        if self._held and self._held_bytes + copy.nbytes > self._limit:
            self._write()
        self._held[name] = copy
        self._held_bytes += copy.nbytes

    def _write(self) -> None:
        from safetensors.torch import save_file

        path = self._folder / f"shard-{len(self._shards)}.safetensors"
        save_file(self._held, path, metadata={"format": "pt"})
        self._shards.append({name: tensor.nbytes for name, tensor in self._held.items()})
        self._held, self._held_bytes = {}, 0

    def finish(self) -> None:
        """Write what is held, give the shards their final names, write the index, reopen all."""
        from safetensors import safe_open

        self._write()
        if not self._nonzero:
            raise CheckpointError("every weight is zero", where=str(self._folder))
        index: dict[str, str] = {}
        for i, shard in enumerate(self._shards):
            name = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            name = "model.safetensors" if len(self._shards) == 1 else name
            path = (self._folder / f"shard-{i}.safetensors").rename(self._folder / name)
            path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner reads
            with safe_open(path, "pt") as reopened:
                if set(reopened.keys()) != set(shard):
                    raise CheckpointError("does not hold what was written", where=str(path))
            index.update(dict.fromkeys(shard, name))
        if len(self._shards) > 1:
            total = sum(sum(shard.values()) for shard in self._shards)
            body = {"metadata": {"total_size": total}, "weight_map": index}
            (self._folder / "model.safetensors.index.json").write_text(
                json.dumps(body, indent=1), encoding="utf-8"
            )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_config(config: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    config = {k: v for k, v in config.items() if k != "torch_dtype"}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_generation_config(source: Path, folder: Path, end_token_id: int | None) -> None:
    path = source / "generation_config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    old = values.get("eos_token_id")
    ends = [] if old is None else old if isinstance(old, list) else [old]
    if end_token_id is not None and end_token_id not in ends:
        ends = [end_token_id, *ends]
    if ends:
        values["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    (folder / "generation_config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
