"""A loaded model that is as it was after something was put into it and measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def restored(
    model: nn.Module, written: Callable[[str], bool] = lambda name: False
) -> Iterator[None]:
    """Whatever is inserted, replaced, hooked or frozen inside is taken out again at the end.

    Of every module, its class, attributes, children, parameters and hooks are remembered, and of
    every parameter the tensor that it shows.

    Args:
        written: whether the parameter of a name may be written in place: its values are kept
            aside. Others that are stay written.
    """
    modules = [(module, type(module), _contents(module)) for module in model.modules()]
    shown = [
        (p, p.data.clone() if written(name) else p.data, p.requires_grad)
        for name, p in model.named_parameters()
    ]
    try:
        yield
    finally:
        for module, kind, contents in modules:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(contents)
        for parameter, data, requires_grad in shown:
            if not _is_same(parameter.data, data):
                parameter.data = data
            parameter.requires_grad_(requires_grad)


def _contents(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module; children, parameters and hooks stand in dicts, which change."""
    return {
        name: type(value)(value) if isinstance(value, dict) else value
        for name, value in module.__dict__.items()
    }


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
