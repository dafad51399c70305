"""`peft`'s layers inside a model, and the names that `peft` gives their tensors in files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

ADAPTER = "default"  # the name that peft gives the only adapter
PREFIX = "base_model.model."  # of every name in a file


def inject(config: Any, model: Any, marks: tuple[str, ...]) -> None:
    """Put the layers of a `PeftConfig` into the model, their parameters in its dtype.

    Every engine keeps float32 masters beside parameters of 16 bits, so that adapters need no dtype
    of their own.
    """
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, and of a head: both are dealt with here
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    dtype = model.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        if any(part in marks for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)


def quiet_import() -> None:
    """Import peft without what it and bitsandbytes say of kernels that this machine has not."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import peft  # noqa: F401


def layers_with(model: nn.Module, attribute: str) -> dict[str, Any]:
    """The layers that peft put there, by name: those with `lora_A` or `ia3_l`."""
    return {n: m for n, m in model.named_modules() if ADAPTER in getattr(m, attribute, ())}


@contextmanager
def switched_off(model: nn.Module, attribute: str) -> Iterator[None]:
    """Let the layers of `layers_with` give what their frozen linears give.

    By the flag that `peft` asks in every forward: its own methods would freeze the adapters too.
    """
    layers = list(layers_with(model, attribute).values())
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def file_name(name: str) -> str:
    """The name of a tensor in the file, as `peft` saves it, from that in the model."""
    name = name.removesuffix(f".{ADAPTER}").replace(f".{ADAPTER}.", ".")
    if name.endswith(".lora_magnitude_vector.weight"):
        name = name.removesuffix(".weight")
    return PREFIX + name


def model_name(name: str) -> str:
    """The inverse of `file_name`."""
    name = name.removeprefix(PREFIX)
    *path, last = name.split(".")
    if last in ("lora_magnitude_vector", "ia3_l"):
        tail = ".weight" if last == "lora_magnitude_vector" else ""
        return f"{name}.{ADAPTER}{tail}"
    if path and path[-1] in ("lora_A", "lora_B"):
        return ".".join([*path, ADAPTER, last])
    return name


def base_name(kept: Mapping[str, torch.Tensor], name: str) -> str:
    """A tensor of the base model's files under its name in the model.

    Files may leave out the name of the backbone: `h.0.attn.c_attn.weight` of GPT-2 is
    `transformer.h.0.attn.c_attn.weight` in the model.
    """
    for prefix in {"": None, **{f"{key.partition('.')[0]}.": None for key in kept}}:
        module = (prefix + name).rpartition(".")[0]
        if any(key.startswith(f"{module}.") for key in kept):
            return prefix + name
    return name
