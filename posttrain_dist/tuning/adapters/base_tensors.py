"""The tensors of a base model's files, one after the other, and what NF4 makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain_dist.files import read_object
from posttrain_dist.models.folder import INDEX, SINGLE

# Ends of the names that bitsandbytes gives the scales of a packed weight `….weight`.
_STATE = ".quant_state.bitsandbytes__nf4"
_SCALES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)


def base_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the files, tensor) of a checked model folder; each valid until the next.

    What is stored in NF4 comes as the numbers that it stands for, in the dtype it was made of.
    """
    from safetensors import safe_open

    files = tensor_files(folder)
    packed = {name.removesuffix(_STATE) for name in files if name.endswith(_STATE)}
    for file in dict.fromkeys(files.values()):
        with safe_open(file, "pt") as opened:
            for name in (n for n, place in files.items() if place == file):
                if name in packed:
                    yield name, _unpacked(name, files)
                elif not (name.endswith(_SCALES) and _owner(name) in packed):
                    yield name, opened.get_tensor(name)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name -> file, of every tensor of a checked model folder."""
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        names = read_object(folder / INDEX)["weight_map"]
        return {name: folder / file for name, file in names.items()}
    with safe_open(folder / SINGLE, "pt") as opened:
        return dict.fromkeys(opened.keys(), folder / SINGLE)


def _owner(name: str) -> str:
    end = next(end for end in _SCALES if name.endswith(end))
    return name.removesuffix(end)


def _unpacked(name: str, files: dict[str, Path]) -> torch.Tensor:
    """The numbers of a weight that the files store in NF4."""
    from bitsandbytes import functional
    from safetensors import safe_open

    parts: dict[str, torch.Tensor] = {}
    for end in ("", *_SCALES):
        if name + end in files:
            with safe_open(files[name + end], "pt") as opened:
                parts[end] = opened.get_tensor(name + end)
    weight = parts.pop("")
    scales = {f"weight{end}": tensor for end, tensor in parts.items()}
    state = functional.QuantState.from_dict(scales, device=torch.device("cpu"))
    found: torch.Tensor = functional.dequantize_4bit(weight.view(torch.uint8), state)
    return found


class Nf4Linears:
    """The weights of a model that are in NF4 where it is loaded so: all linears but the head."""

    def __init__(self, folder: Path) -> None:
        import transformers
        from transformers.pytorch_utils import Conv1D

        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=False
            )
        self._prefix = f"{model.base_model_prefix}."
        head = model.get_output_embeddings()
        # weight -> whether it is [in, out], as in GPT-2; bitsandbytes packs [out, in].
        self._turned = {
            f"{name}.weight": isinstance(module, Conv1D)
            for name, module in model.named_modules()
            if module is not head and (type(module) is nn.Linear or isinstance(module, Conv1D))
        }

    def _name(self, name: str) -> str:
        return name if name in self._turned else self._prefix + name

    def __contains__(self, name: str) -> bool:
        """Whether the tensor of this name in the files is one of them."""
        return self._name(name) in self._turned

    def rounded(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The numbers that NF4 keeps of a weight, in its shape and dtype.

        Double quantisation in blocks of 64, as the model is loaded (Dettmers et al.,
        arXiv:2305.14314).
        """
        turned = self._turned[self._name(name)]
        through = through_nf4(weight.T.contiguous() if turned else weight)
        return through.T.contiguous() if turned else through


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What is left of a weight once it was packed in NF4; on a GPU if there is one."""
    from bitsandbytes import functional

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed, state = functional.quantize_4bit(
        weight.to(device), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    found: torch.Tensor = functional.dequantize_4bit(packed, state)
    return found.to(weight.device, weight.dtype)
