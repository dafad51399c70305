"""Which implementation runs: the one that is named, or chosen by the device."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

from posttrain_kernels.passes import torch_kernels
from posttrain_kernels.passes.targets import Kernels

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")


def select_impl(impl: str, device: torch.device) -> str:
    """The implementation for `device`; why `auto` chose it is logged once.

    Raises:
        ValueError: unknown name, or triton where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, it is {impl!r}")
    has_triton = find_spec("triton") is not None
    if impl == "auto":
        return _auto(device.type, has_triton)
    if impl == "triton":
        if not has_triton:
            raise ValueError("impl='triton' needs the package triton; use impl='torch'")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "impl='triton' runs on a CPU only with TRITON_INTERPRET=1 in the environment, "
                "for tests; use impl='torch'"
            )
    return impl


def get_kernels(impl: str) -> Kernels:
    """The kernels of "torch" or "triton"."""
    if impl == "torch":
        return torch_kernels.KERNELS
    from posttrain_kernels.passes import triton_kernels  # needs triton: only here

    return triton_kernels.KERNELS


@cache
def _auto(device_type: str, has_triton: bool) -> str:
    if device_type == "cuda" and has_triton:
        chosen, reason = "triton", "the input is on a GPU"
    elif device_type == "cuda":
        chosen, reason = "torch", "the input is on a GPU, but triton is not installed"
    else:
        chosen, reason = "torch", f"the input is on a {device_type}"
    logging.getLogger(__name__).info("fused cross-entropy: impl=%s, because %s", chosen, reason)
    return chosen
