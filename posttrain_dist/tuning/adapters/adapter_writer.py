"""Writes an adapter as a folder: aside, reopened and checked, and renamed when it is whole."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import CheckpointError, ModelError, reason
from posttrain_dist.files import commit_folder, partial_of
from posttrain_dist.tuning.adapters.adapter_folder import (
    ADAPTERS_WEIGHTS,
    CONFIG,
    OURS,
    PEFT_WEIGHTS,
    parts_of,
    read_one,
)
from posttrain_dist.tuning.adapters.model_card import adapter_card, ensemble_card
from posttrain_dist.tuning.prompt_tuning import split_ensemble
from posttrain_dist.tuning.saved_adapter import ENSEMBLE, SavedAdapter

if TYPE_CHECKING:
    import torch

FORMAT = 1  # of posttrain.json
# Keys of `SavedAdapter.config` that plain peft would warn about stand in posttrain.json.
_OWN_KEY = "posttrain_"


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What an adapter folder says of where it comes from."""

    method: str  # option of the group `tuning`
    base_digest: str
    tuning: Mapping[str, Any] = field(default_factory=dict)  # values of the group
    channels: Sequence[str] = ()  # of the data
    run: str = ""  # its id or folder
    step: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    vocab_size: int | None = None  # of a model whose embeddings grew for new tokens


# ------------------------------------------------------------------------------------- writing


def write_adapter(
    target: Path,
    saved: SavedAdapter,
    base: Path,
    facts: AdapterFacts,
    *,
    carry: Callable[[Path], None] = lambda folder: None,
    trained: bool = True,
) -> Path:
    """Write an adapter, or the prompts of an ensemble, beside `target`, check it, and rename it.

    Args:
        target: the new folder; an older one is replaced.
        saved: what the tuning's `to_adapter` made; of an ensemble the prompts one below the other,
            and `posttrain_ensemble` of the config says how many.
        base: folder of the base model, which adapter_config.json names.
        carry: writes tokenizer, templates and generation config into a folder, and checks them.
        trained: whether an update was made: tensors that are still zero are an error then.

    Raises:
        CheckpointError: what was written is not what it should be, or the disk refused.
    """
    partial = partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    with _leaving_nothing(partial, target):
        partial.mkdir(parents=True)
        num_prompts = int(saved.config.get(ENSEMBLE, 1))
        if num_prompts == 1:
            _write_one(partial, saved, base, facts, carry)
        else:
            for number, each in enumerate(split_ensemble(saved)):
                folder = partial / f"prompt-{number}"
                folder.mkdir()
                _write_one(folder, each, base, facts, carry)
            card = ensemble_card(num_prompts, base)
            (partial / "README.md").write_text(card, encoding="utf-8")
        check_adapter(partial, trained=trained, shown=target)
        commit_folder(partial, target, replace=True)
    return target


def _write_one(
    folder: Path,
    saved: SavedAdapter,
    base: Path,
    facts: AdapterFacts,
    carry: Callable[[Path], None],
) -> None:
    from safetensors.torch import save_file

    own = {key: value for key, value in saved.config.items() if key.startswith(_OWN_KEY)}
    config = {key: value for key, value in saved.config.items() if key not in own}
    is_peft = "peft_type" in config
    config["base_model_name_or_path"] = str(base)
    config |= {"inference_mode": True} if is_peft else {"model_name": str(base)}
    tensors = {
        name: tensor.detach().to("cpu").contiguous() for name, tensor in saved.tensors.items()
    }
    file = folder / (PEFT_WEIGHTS if is_peft else ADAPTERS_WEIGHTS)
    with file.open("wb"):  # safetensors makes files that only their owner reads
        pass
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)
    ours = {
        "format": FORMAT,
        "base": str(base),
        **asdict(facts),
        "config": own,
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(tensors.items())},
    }
    for name, values in ((CONFIG, config), (OURS, ours)):
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    card = adapter_card(
        saved,
        base,
        method=facts.method,
        tuning=facts.tuning,
        vocab_size=facts.vocab_size,
        channels=facts.channels,
        facts=_lineage(facts),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    carry(folder)


def _lineage(facts: AdapterFacts) -> dict[str, str]:
    """Rows of the model card's table."""
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    rows = {"digest of the base": facts.base_digest, "run": facts.run, "versions": versions}
    if facts.step is not None:
        rows["step"] = f"{facts.step:,}"
    return {name: value for name, value in rows.items() if value}


@contextlib.contextmanager
def _leaving_nothing(partial: Path, target: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the adapter cannot be written: {reason(error)}",
            where=str(target),
            fix="free space on that disk; the checkpoints are as they were: `posttrain export "
            "<run folder> <new folder>` writes the newest one, to another disk too",
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------------ checking


def check_adapter(folder: Path, *, trained: bool = True, shown: Path | None = None) -> None:
    """Reopen an adapter that was just written: names, shapes, finite, and not all zero.

    Args:
        trained: whether an update was made; before the first one LoRA's B is zero.
        shown: what the folder will be called, for errors.

    Raises:
        CheckpointError: it cannot be read back, or holds nothing that was trained.
    """
    where = str(shown or folder)
    try:
        adapters = [read_one(each) for each in parts_of(folder)]
    except ModelError as error:
        raise CheckpointError(
            f"the adapter that was written cannot be used: {error.what}",
            where=where,
            fix="the checkpoints are as they were; look at train/grad_norm in the report, and "
            "export an earlier one with --step",
        ) from error
    for saved in adapters if trained else []:
        if still := _zero_classes(saved.tensors):
            raise CheckpointError(
                f"nothing was trained: every tensor {still[0]} of the adapter is zero",
                where=where,
                fix="raise optimizer.lr, and check in the report that train/loss falls",
            )


def _zero_classes(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Classes of tensors (lora_B, prompt_embeddings) all of which are zero in all places."""
    nonzero: dict[str, bool] = {}
    for name, tensor in tensors.items():
        kind = class_of(name)
        nonzero[kind] = nonzero.get(kind, False) or bool(tensor.any())
    return sorted(kind for kind, found in nonzero.items() if not found)


def class_of(name: str) -> str:
    """What a tensor is to its method: `lora_B` of `...q_proj.lora_B.weight`."""
    parts = [p for p in name.split(".") if not p.isdecimal() and p not in ("weight", "bias")]
    return parts[-1] if parts else name
