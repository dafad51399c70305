"""An adapter as a folder: written aside and checked, read with every fault named.

    adapter_config.json          method and sizes, as `peft` (or the `adapters` library) has them
    adapter_model.safetensors    the tensors; `adapter.safetensors` in the `adapters` library's
    posttrain.json               digest of the base, tuning, run, versions; what plain peft ignores
    README.md                    the model card
    prompt-0 ... prompt-E-1      in place of all that: the prompts of an ensemble, a folder each

Tokenizer, chat templates and generation config stand beside them: what is served is what was
trained. A folder of plain `peft` is read as well; it has no posttrain.json.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import CheckpointError, ModelError, reason
from posttrain_dist.files import commit_folder, partial_of
from posttrain_dist.tuning.adapters.model_card import adapter_card, ensemble_card
from posttrain_dist.tuning.saved_adapter import SavedAdapter

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
ADAPTERS_WEIGHTS = "adapter.safetensors"  # of the `adapters` library
OURS = "posttrain.json"
FORMAT = 1
# Keys of `SavedAdapter.config` that plain peft would warn about stand in posttrain.json.
_OWN_KEY = "posttrain_"
ENSEMBLE = "posttrain_ensemble"  # how many prompts stand one below the other in the tensors
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_GET_AGAIN = "copy the adapter folder again; `posttrain export RUN OUT` writes that of a run"


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


def split_ensemble(saved: SavedAdapter) -> list[SavedAdapter]:
    """The prompts of an ensemble, each as an adapter of its own."""
    num_prompts = int(saved.config.get(ENSEMBLE, 1))
    config = {key: value for key, value in saved.config.items() if key != ENSEMBLE}
    parts = {name: tensor.chunk(num_prompts) for name, tensor in saved.tensors.items()}
    return [
        SavedAdapter(config, {name: chunks[i].clone() for name, chunks in parts.items()})
        for i in range(num_prompts)
    ]


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
        saved, base, method=facts.method, channels=facts.channels, facts=_lineage(facts)
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
        adapters = [_read_one(each) for each in _parts(folder)]
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


# ------------------------------------------------------------------------------------- reading


def find_adapter(folder: Path) -> Path:
    """The adapter folder that a path names: itself, or `adapter/` of a run.

    Raises:
        ModelError: neither is there.
    """
    for place in (folder, folder / "adapter"):
        if (place / CONFIG).is_file() or (place / "prompt-0" / CONFIG).is_file():
            return place
    is_run = (folder / "config.yaml").is_file()
    raise ModelError(
        f"holds no adapter (there is no {CONFIG})",
        where=str(folder),
        fix=f"`posttrain export {folder}` writes the adapter of its newest checkpoint"
        if is_run
        else "give an adapter folder, or a run that trained one",
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder, or a run, holds an adapter (or the prompts of an ensemble)."""
    try:
        find_adapter(folder)
    except ModelError:
        return False
    return True


def adapter_parts(folder: Path) -> list[Path]:
    """The folders that `peft` loads: the adapter, or each prompt of an ensemble in order.

    Raises:
        ModelError: there is none.
    """
    return _parts(find_adapter(folder))


def _parts(place: Path) -> list[Path]:
    if (place / CONFIG).is_file():
        return [place]
    prompts = place.glob("prompt-*/" + CONFIG)
    return sorted((each.parent for each in prompts), key=lambda part: int(part.name[7:]))


def read_adapter(folder: Path) -> SavedAdapter:
    """The adapter of a folder, ours or plain peft's, or of a run.

    The prompts of an ensemble come as one: their tensors one below the other, and
    `posttrain_ensemble` of the config says how many.

    Raises:
        ModelError: there is none; its config cannot be read; tensors are missing, empty, not
            finite, or have names that no method gives; it is a pickle, which is not read.
    """
    import torch

    parts = [_read_one(part) for part in adapter_parts(folder)]
    if len(parts) == 1:
        return parts[0]
    config = {**parts[0].config, ENSEMBLE: len(parts)}
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    return SavedAdapter(config, tensors)


def read_facts(folder: Path) -> dict[str, Any]:
    """posttrain.json of an adapter folder; {} of one that plain peft wrote.

    Raises:
        ModelError: there is no adapter, or the file cannot be read.
    """
    file = adapter_parts(folder)[0] / OURS
    return _object(file) if file.is_file() else {}


def _read_one(folder: Path) -> SavedAdapter:
    config = _object(folder / CONFIG)
    if not isinstance(config.get("peft_type", config.get("config")), str | dict):
        raise ModelError(
            "names no method: it has no peft_type", where=str(folder / CONFIG), fix=_GET_AGAIN
        )
    ours = _object(folder / OURS) if (folder / OURS).is_file() else {}
    file = _weights_of(folder)
    tensors = _read_tensors(file)
    for name, shape in ours.get("tensors", {}).items():
        found = list(tensors[name].shape) if name in tensors else "not there"
        if found != shape:
            what = f"is not what was written: {name} is {found}, and was {shape}"
            raise ModelError(what, where=str(file), fix=_GET_AGAIN)
    for name in tensors:
        other = name.replace(".lora_A", ".lora_B") if ".lora_A" in name else name
        if other not in tensors:
            what = f"lacks {other}, the counterpart of {name}"
            raise ModelError(what, where=str(file), fix=_GET_AGAIN)
    return SavedAdapter({**config, **ours.get("config", {})}, tensors)


def _weights_of(folder: Path) -> Path:
    for name in (PEFT_WEIGHTS, ADAPTERS_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise ModelError(
            f"has no {PEFT_WEIGHTS}; {pickles[0]} is not read (a pickle can run code)",
            where=str(folder),
            fix="convert it once, where you trust it: PeftModel.from_pretrained(base, folder)"
            ".save_pretrained(new_folder)",
        )
    raise ModelError(f"has no tensors: no {PEFT_WEIGHTS}", where=str(folder), fix=_GET_AGAIN)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    def refuse(what: str, fix: str = _GET_AGAIN) -> ModelError:
        return ModelError(what, where=str(file), fix=fix)

    try:
        with file.open("rb") as stream:
            if stream.read(8) == b"version ":
                raise refuse(
                    "is a Git LFS pointer, not tensors", "run `git lfs pull` in the folder"
                )
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise refuse(f"is truncated or damaged: {reason(error)}") from error
    if not tensors:
        raise refuse("holds no tensors")
    for name, tensor in tensors.items():
        if _NAME.fullmatch(name) is None or ".." in name:
            raise refuse(f"names a tensor as no method does: {name!r}", "do not use this folder")
        if tensor.numel() == 0:
            raise refuse(
                f"{name} is empty, of shape {list(tensor.shape)}: it was saved from a sharded "
                "model without being gathered",
                "save it again, whole",
            )
        if not tensor.is_floating_point():
            raise refuse(f"{name} is of {tensor.dtype}, and an adapter's numbers are floating")
        if not bool(tensor.isfinite().all()):
            raise refuse(
                f"{name} holds NaN or infinity: the training had diverged",
                "export an earlier checkpoint with --step, or train with a lower optimizer.lr",
            )
    return tensors


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"cannot be read: {reason(error)}", where=str(file), fix=_GET_AGAIN
        ) from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=str(file), fix=_GET_AGAIN)
    return value
