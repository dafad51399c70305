"""An adapter as a folder: found, and read with every fault named.

    adapter_config.json          method and sizes, as `peft` (or the `adapters` library) has them
    adapter_model.safetensors    the tensors; `adapter.safetensors` in the `adapters` library's
    posttrain.json               digest of the base, tuning, run, versions; what plain peft ignores
    README.md                    the model card
    prompt-0 ... prompt-E-1      in place of all that: the prompts of an ensemble, a folder each

Tokenizer, chat templates and generation config stand beside them: what is served is what was
trained. A folder of plain `peft` is read as well; it has no posttrain.json. `adapter_writer.py`
writes one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import ModelError, reason
from posttrain_dist.tuning.saved_adapter import ENSEMBLE, SavedAdapter

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
ADAPTERS_WEIGHTS = "adapter.safetensors"  # of the `adapters` library
OURS = "posttrain.json"
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_GET_AGAIN = "copy the adapter folder again; `posttrain export RUN OUT` writes that of a run"


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


def adapter_parts(folder: Path) -> list[Path]:
    """The folders that `peft` loads: the adapter, or each prompt of an ensemble in order.

    Raises:
        ModelError: there is none.
    """
    return parts_of(find_adapter(folder))


def parts_of(place: Path) -> list[Path]:
    """`adapter_parts` of a folder that is being written."""
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

    parts = [read_one(part) for part in adapter_parts(folder)]
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


def read_one(folder: Path) -> SavedAdapter:
    """The adapter of a folder that `peft` loads; see `read_adapter`."""
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
