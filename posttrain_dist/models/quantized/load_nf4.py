"""Loading a base in NF4 by transformers and bitsandbytes, and what they get wrong put right.

nf4_options         keywords of `from_pretrained`
quantising          the context of loading: tensor by tensor, each looked at before
prepare_linears     what must hold of every 4-bit layer before it is trained through
packed_values       the numbers of a packed parameter that can be looked at
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain_dist.errors import ModelError
from posttrain_dist.models.classifier.scalar_head import head_module
from posttrain_dist.models.layers import decoder_layers

# bitsandbytes, which peft imports too, warns about a kernel of a hub that it cannot have here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
BLOCK = 64  # weights that share a scale
_SYNCHRONOUS = "HF_DEACTIVATE_ASYNC_LOAD"


def nf4_options(dtype: torch.dtype, device: torch.device, *, stored: bool) -> dict[str, Any]:
    """Keywords of `from_pretrained` for a base in NF4, made on `device` tensor by tensor.

    Storage has the dtype that is computed in, so that ZeRO-3 can shard packed weights beside the
    others (its flat buffers have one dtype).

    Args:
        stored: the folder holds NF4 already; its own settings are taken.
    """
    import transformers

    options: dict[str, Any] = {"device_map": {"": device}}
    if not stored:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        )
    return options


@contextmanager
def quantising() -> Iterator[dict[str, torch.Tensor]]:
    """Load one tensor after the other; yields the extremes of each that is quantised meanwhile.

    Threads that read ahead would hold up to twice the model in host memory. And a NaN is gone
    once its block is quantised: CUDA's maximum passes over it.
    """
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    extremes: dict[str, torch.Tensor] = {}
    convert = Bnb4bitQuantize.convert

    def looked_at(self: Any, input_dict: dict[str, Any], *args: Any, **options: Any) -> Any:
        for name, value in input_dict.items():
            values = value[0] if isinstance(value, list) else value
            extremes[name] = torch.stack(torch.aminmax(values)).float()  # NaN where one is
        packed = convert(self, input_dict, *args, **options)
        if values.device.type == "cpu":
            _give_back_freed_memory()
        return packed

    before = os.environ.get(_SYNCHRONOUS)
    os.environ[_SYNCHRONOUS] = "1"
    Bnb4bitQuantize.convert = looked_at
    try:
        yield extremes
    finally:
        Bnb4bitQuantize.convert = convert
        if before is None:
            del os.environ[_SYNCHRONOUS]
        else:
            os.environ[_SYNCHRONOUS] = before


def _give_back_freed_memory() -> None:
    """Let glibc return the pages of what a CPU needed to quantise one tensor.

    Between the packed tensors that stay, up to twice the model of them would be kept otherwise.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def refuse_unquantisable(hf_config: Any, folder: Path, device: torch.device) -> int:
    """Refuse what bitsandbytes cannot store or read, before weights are read.

    It takes the place of torch's own linear and of GPT-2's, not of others. And on a CPU (0.50) it
    reads the blocks of 64 weights that share a scale row by row, though they are made without
    regard to rows: with rows of another length it computes with wrong weights.

    Returns:
        How many weights of the layers are stored in 4 bits.

    Raises:
        ModelError: with the class of the layers, or the length of the rows.
    """
    import transformers
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
    taken, rows = 0, set()
    left: dict[str, int] = {}
    for module in (m for layer in decoder_layers(model) for m in layer.modules()):
        matrices = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
        count = sum(p.numel() for p in matrices)
        if type(module) is nn.Linear or isinstance(module, Conv1D):
            taken += count
            rows.add(matrices[0].shape[0 if isinstance(module, Conv1D) else 1])
        elif matrices:
            left[type(module).__name__] = left.get(type(module).__name__, 0) + count
    where = str(folder / "config.json")
    kept = sum(left.values())
    if kept > 0.05 * taken:
        raise ModelError(
            f"{type(model).__name__} computes by {', '.join(sorted(left))}, which bitsandbytes "
            f"does not store in 4 bits: {kept:,} of {taken + kept:,} weights of its layers would "
            "stay as they are",
            where=where,
            fix="set tuning.quantize=none",
        )
    odd = sorted(length for length in rows if length % BLOCK)
    if device.type == "cpu" and odd:
        raise ModelError(
            f"has matrices whose rows have {', '.join(map(str, odd))} weights, and on a CPU "
            f"bitsandbytes computes wrongly in NF4 unless that is a multiple of {BLOCK}",
            where=where,
            fix="set tuning.quantize=none, or train on a GPU",
        )
    return taken


def prepare_linears(model: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """Make every 4-bit layer compute in `dtype`, pack its bytes as `dtype`, and stay as it is.

    On a CPU with AVX512_BF16, bitsandbytes packs a layer's weight in another order when it is
    first evaluated, and in training reads it in the old one: the loss is then of another model.

    Raises:
        ModelError: the head is in 4 bits, or no layer is.
    """
    import bitsandbytes

    linears = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    head = head_module(model)
    if not linears or isinstance(head, bitsandbytes.nn.Linear4bit):
        raise ModelError(
            "holds its head in 4 bits too" if linears else "no layer of it is in NF4",
            where=str(folder),
            fix="use the folder of the unquantised model",
        )
    for linear in linears:
        linear.support_avx512bf16_for_cpu = False
        linear.compute_dtype, linear.compute_type_is_set = dtype, True
        weight: Any = linear.weight
        if weight.dtype != dtype:  # of a folder that was quantised elsewhere
            weight.data = weight.data.reshape(-1).view(torch.uint8).view(dtype).reshape(-1, 1)
        weight.quant_storage = linear.quant_storage = dtype
        weight.quant_state.dtype = dtype  # of what it is dequantised to


def refuse_trained(model: nn.Module, folder: Path) -> None:
    """Refuse packed weights that the tuning would train: their bytes are no numbers.

    Raises:
        ModelError: with the first one's name.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and packed_values(parameter) is not None:
            raise ModelError(
                f"{name} is stored in NF4 and cannot be trained itself",
                where=str(folder),
                fix="use tuning=lora or another adapter, or the folder of the unquantised model",
            )


def packed_values(parameter: Any) -> torch.Tensor | None:
    """What tells whether a packed parameter is finite: its scales; None: it is not packed.

    Its own bytes are no numbers, whatever their dtype. Scales that are quantised themselves are
    bytes too, whose scales and mean are numbers.
    """
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return None
    if not state.nested:
        return state.absmax  # type: ignore[no-any-return]
    return torch.cat([state.state2.absmax.reshape(-1), state.offset.reshape(1)])
