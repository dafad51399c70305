"""AdamW of bitsandbytes: moments of 8 bits in blocks, or paged; the only file that imports it here.

8 bits (Dettmers et al., arXiv:2110.02861): each block of 256 numbers of a moment is kept as its
largest magnitude and one of 256 codes a number. Tensors below 4096 elements keep 32 bits.
Paged (Dettmers et al., arXiv:2305.14314): the moments lie in unified memory, which the driver
moves to the host when the GPU is full. On a CPU nothing pages.

Named state of a parameter: `step`, `exp_avg`, `exp_avg_sq` as torch's AdamW has them; of 8 bits
`state1`, `absmax1` (codes and magnitudes of exp_avg), `state2`, `absmax2` (of exp_avg_sq).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from posttrain_dist.engine import AdamW

BLOCK = 256  # elements, as the optimizer of bitsandbytes has it
_FLOATS = {"state1": "exp_avg", "state2": "exp_avg_sq"}


def import_bitsandbytes() -> Any:
    """Import it without its warnings about what a CPU lacks."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def wanted(config: AdamW) -> bool:
    """Whether the optimizer is one of bitsandbytes."""
    return config.state_bits != 32 or config.paged


def blockwise_adamw(
    groups: list[dict[str, Any]], config: AdamW, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW with moments of `config.state_bits`, paged on a GPU if `config.paged`."""
    optimizer: torch.optim.Optimizer = import_bitsandbytes().optim.AdamW(
        groups,
        lr=config.lr or 0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        optim_bits=config.state_bits,
        is_paged=config.paged and device.type == "cuda",
    )
    return optimizer


def named_moments(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The named state of one parameter from what a torch or bitsandbytes optimizer keeps of it."""
    found = {key: value for key, value in state.items() if not key.startswith("qmap")}
    if isinstance(found.get("step"), int):
        found["step"] = torch.tensor(float(found["step"]))
    if "state1" in found and "absmax1" not in found:
        found = {_FLOATS.get(key, key): value for key, value in found.items()}
    return found


def set_moments(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, values: Mapping[str, torch.Tensor]
) -> None:
    """Give a parameter of `optimizer` the named state of any optimizer; its own kind stays exact.

    Args:
        values: on any device; empty: the parameter has had no update.
    """
    optimizer.state.pop(parameter, None)
    if "step" not in values:
        return
    if not hasattr(optimizer, "init_state"):
        device = parameter.device
        kept = {key: value.to(device, copy=True) for key, value in values.items()}
        optimizer.state[parameter] = to_float(kept)
        return
    group, place = next(
        (g, (i, j))
        for i, g in enumerate(optimizer.param_groups)
        for j, member in enumerate(g["params"])
        if member is parameter
    )
    optimizer.init_state(group, parameter, *place)  # the buffers, paged where they are
    if parameter.is_cuda:
        torch.cuda.synchronize()  # pages are zeroed by the GPU and written by the host
    state = optimizer.state[parameter]
    blocks = "absmax1" in state
    given = _to_blocks(values) if blocks else to_float(values)
    for key, name in _FLOATS.items():
        state[key].copy_(given[key if blocks else name])
    for key in ("absmax1", "absmax2") if blocks else ():
        state[key].copy_(given[key])
    state["step"] = int(values["step"])


def forget_moments(optimizer: torch.optim.Optimizer) -> None:
    """Zero all that a torch, bitsandbytes or DeepSpeed optimizer keeps, as before its first update.

    In place: pages that bitsandbytes has made are never freed, so that new ones would be more.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # pages are written by the GPU and zeroed by the host
    for state in optimizer.state.values():
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                state[key] = 0  # the count of updates
            elif not key.startswith("qmap"):  # what codes stand for
                value.zero_()


def to_float(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Named state with moments of 8 bits read as float32; others as they are."""
    if "absmax1" not in values:
        return dict(values)
    functional = import_bitsandbytes().functional
    found = {k: v for k, v in values.items() if k not in (*_FLOATS, "absmax1", "absmax2")}
    for key, name in _FLOATS.items():
        magnitudes = values[key.replace("state", "absmax")]
        codes = values[key].to(magnitudes.device)  # torch takes pages for memory of the host
        code = _codes(key == "state1").to(codes.device)
        found[name] = functional.dequantize_blockwise(
            codes, absmax=magnitudes, code=code, blocksize=BLOCK
        )
    return found


def _to_blocks(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if "absmax1" in values:
        return dict(values)
    functional = import_bitsandbytes().functional
    found: dict[str, torch.Tensor] = {}
    for key, name in _FLOATS.items():
        code = _codes(key == "state1").to(values[name].device)
        codes, state = functional.quantize_blockwise(values[name], code=code, blocksize=BLOCK)
        found |= {key: codes, key.replace("state", "absmax"): state.absmax}
    return found


@cache
def _codes(signed: bool) -> torch.Tensor:
    """What the 256 codes stand for, as shares of a block's largest magnitude."""
    codes: torch.Tensor = import_bitsandbytes().functional.create_dynamic_map(signed=signed)
    return codes
