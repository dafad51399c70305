"""Write a Hugging Face model folder from a stream of whole tensors, and check it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain_dist import dist
from posttrain_dist.checkpoint.carried_files import TEMPLATE, TEMPLATE_FOLDER, carry_files
from posttrain_dist.checkpoint.manifest import with_network
from posttrain_dist.checkpoint.reward_folder import finish_reward_folder
from posttrain_dist.checkpoint.served_check import check_served
from posttrain_dist.data.chat.rendering.served import Served
from posttrain_dist.data.chat.rendering.template_choice import DEFAULT
from posttrain_dist.errors import CheckpointError, ModelError, reason
from posttrain_dist.files import commit_folder, partial_of, read_object
from posttrain_dist.models.classifier import is_classifier
from posttrain_dist.models.folder import load_tokenizer
from posttrain_dist.models.tokenizer.new_tokens import write_tokens

SHARD_BYTES = 4 << 30

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run knows of its model beside the weights."""

    network: Mapping[str, Any] = field(default_factory=dict)  # `Recipe.model`; empty: the source's
    end_token_ids: Sequence[int] = ()  # that end an assistant turn: generation stops at them
    served: Served | None = None  # chat templates and rows to check them; null: the source's
    card: str = ""  # text of README.md; "": there is none
    added_tokens: Sequence[str] = ()  # `model.add_tokens`, which the source's tokenizer has not


def write_hf_folder(
    tensors: Iterable[tuple[str, torch.Tensor]],
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype,
    facts: RunFacts,
    notice: Callable[[str], None] = _log.info,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write weights, config, tokenizer, chat templates and generation config to `target`.

    Collective: every rank runs through `tensors`, rank 0 writes; never more than one shard is
    held in memory. The folder takes its name only when it renders what the run was trained on.

    Args:
        tensors: (name, whole tensor); a tensor is copied before the next is asked for.
        source: the model folder that the run started from: tokenizer and config.
        dtype: of the written floating-point weights.
        facts: what else is written of the run.
        notice: called with what the user should know of the folder.

    Raises:
        CheckpointError: a weight is not finite, all weights are zero, the disk refused, or a
            training row's prompt comes out otherwise than it was trained.
    """
    partial = partial_of(target)
    main = dist.rank() == 0
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    config = with_network(
        json.loads((source / "config.json").read_text(encoding="utf-8")), facts.network
    )
    writer = _ShardWriter(partial, shard_bytes)
    for name, tensor in tensors:
        if main and not (config.get("tie_word_embeddings") and name == "lm_head.weight"):
            with _leaving_nothing(partial, target):
                writer.add(name, tensor, dtype)

    def finish() -> None:
        with _leaving_nothing(partial, target):
            writer.finish()
            _write_config(config, partial, dtype)
            if facts.card:
                (partial / "README.md").write_text(facts.card, encoding="utf-8")
            write_served_files(source, partial, facts, target, notice)
            commit_folder(partial, target, replace=True)

    dist.on_main(finish)
    return target


def write_served_files(
    source: Path,
    folder: Path,
    facts: RunFacts,
    target: Path,
    notice: Callable[[str], None] = _log.info,
) -> None:
    """What is served beside the weights, of a model as of an adapter; see `write_hf_folder`.

    Args:
        folder: written to.
        target: what it will be called, for errors.

    Raises:
        CheckpointError: a training row's prompt comes out otherwise than it was trained.
        OSError: the disk refused.
    """
    carry_files(source, folder, templates=facts.served is None, notice=notice)
    if not (folder / "config.json").is_file():
        _keep_tokenizer_class(source, folder)
    write_tokens(folder, facts.added_tokens)
    if facts.served is not None:
        _write_templates(facts.served, folder)
    if is_classifier(facts.network):
        finish_reward_folder(folder, source.name, facts.end_token_ids, target, notice)
    else:
        _write_generation_config(source, folder, facts.end_token_ids, notice)
    if facts.served is not None:
        check_served(folder, facts.served, target, notice)


def _keep_tokenizer_class(source: Path, folder: Path) -> None:
    """An adapter has no config.json, by which transformers may choose the tokenizer's class."""
    from transformers import AutoTokenizer

    try:
        wanted, found = (
            type(AutoTokenizer.from_pretrained(f, local_files_only=True, trust_remote_code=False))
            for f in (source, folder)
        )
    except Exception:  # tokenizers raise bare Exception; `check_served` says what is wrong
        return
    if wanted is not found:
        file = folder / "tokenizer_config.json"
        values = {**read_object(file), "tokenizer_class": wanted.__name__}
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")


@contextlib.contextmanager
def _leaving_nothing(partial: Path, target: Path) -> Iterator[None]:
    """Remove the part that was written where writing fails; what a disk refuses is for the user."""
    from safetensors import SafetensorError

    try:
        yield
    except CheckpointError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
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
        # By its extremes, which need no memory of their own where it lies: NaN where any value is.
        extremes = torch.stack(torch.aminmax(tensor.detach())) if tensor.numel() else torch.zeros(1)
        if not extremes.isfinite().all():
            raise CheckpointError(
                f"{name} holds NaN or infinity: the run has diverged",
                where=str(self._folder),
                fix="export an earlier checkpoint, and look at train/grad_norm in the report",
            )
        self._nonzero = self._nonzero or bool(extremes.any())
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
    # Of auto_map the code is not carried.
    config = {k: v for k, v in config.items() if k not in ("torch_dtype", "auto_map")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_templates(served: Served, folder: Path) -> None:
    """The chat templates, as transformers' `save_pretrained` lays them out."""
    for name, source in served.templates.items():
        path = folder / TEMPLATE
        if name != DEFAULT:
            path = folder / TEMPLATE_FOLDER / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")


def _write_generation_config(
    source: Path, folder: Path, end_token_ids: Sequence[int], notice: Callable[[str], None]
) -> None:
    """The source's, which also stops at `end_token_ids`, and pads where nothing else says how."""
    path = source / "generation_config.json"
    values: dict[str, Any] = {}
    try:
        values = read_object(path)
    except (OSError, ValueError) as error:
        notice(f"{path} is not carried into the export: {reason(error)}")
    old = values.get("eos_token_id")
    own = [] if old is None else old if isinstance(old, list) else [old]
    ends = list(dict.fromkeys([*end_token_ids, *own]))
    if ends:
        values["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if ends and values.get("pad_token_id") is None and _has_no_pad(source):
        values["pad_token_id"] = ends[0]
        notice(
            f"the tokenizer has no pad token: generation_config.json of the export pads with "
            f"token {ends[0]}, an end token"
        )
    (folder / "generation_config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def _has_no_pad(source: Path) -> bool:
    try:
        return load_tokenizer(source).pad_token_id is None
    except ModelError:
        return False
