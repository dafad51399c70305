"""The optimizer state under DeepSpeed by parameter name; imports no deepspeed.

Each stage keeps float32 masters and moments in other places:

    0      whole on every rank: in float32 the parameters themselves, in bfloat16 one beside each
    1, 2   flat partitions, of which a parameter knows its piece (`_hp_mapping`)
    3      flat partitions, which the ZeRO optimizer reads and writes piece by piece

A rank's piece of a parameter is `numel` elements from `start` of the flattened whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from posttrain_dist import dist
from posttrain_dist.engine.blockwise import forget_moments, to_float
from posttrain_dist.engine.optimizers import whole_shape

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Place(NamedTuple):
    start: int
    numel: int


class ShardedState:
    """Reads and writes masters and moments of the trained parameters.

    Args:
        zero: the optimizer that `deepspeed.initialize` returned.
        base: the torch optimizer inside it.
        trained: parameters by name, in an order that is the same on all ranks.
    """

    def __init__(
        self, zero: Any, base: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]
    ) -> None:
        self._zero, self._base, self._trained = zero, base, trained
        self._masters: dict[torch.Tensor, torch.Tensor] = {}  # stage 0 in bfloat16
        for members, masters in zip(
            getattr(zero, "fp16_groups", ()), getattr(zero, "fp32_groups", ()), strict=False
        ):
            self._masters.update(zip(members, masters, strict=True))

    def local(
        self, wanted: Callable[[str], bool], *, moments: bool
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Flat master and moments of the wanted ones, as far as they lie on this rank."""
        keys = self._keys() if moments else ("master",)
        for name, parameter in self._trained.items():
            if not wanted(name):
                continue
            place = self._place(parameter)
            if place is None:
                yield name, {}
            else:
                yield name, {key: self._read(parameter, key)[: place.numel] for key in keys}

    def whole(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Master, moments and step, whole on every rank; collective."""
        keys = self._keys()
        for name, parameter in self._trained.items():
            tensors = {key: self._gather(parameter, key) for key in keys}
            if self._base.state:
                tensors["step"] = torch.tensor(self._step(), dtype=torch.float32)
            yield name, tensors

    def load(
        self, get: Callable[[str], dict[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Write what `get` gives by name; yields each master, which the parameter takes."""
        self._make_moments()
        steps = [0.0]
        for name, parameter in self._trained.items():
            values = to_float(get(name))
            steps += [float(values["step"])] if "step" in values else []
            for key in ("master", *MOMENTS):
                value = values.get(key, torch.zeros(whole_shape(parameter)))
                if value.shape != whole_shape(parameter):
                    raise ValueError(f"{name} has shape {tuple(value.shape)}")
                self._write(parameter, key, value.float().flatten())
            yield name, values["master"]
        # One count for all: here every parameter is in every update.
        for state in self._base.state.values():
            if isinstance(state["step"], torch.Tensor):
                state["step"].fill_(max(steps))
            else:
                state["step"] = int(max(steps))

    def forget_updates(self) -> None:
        """Zero the moments and the count of updates, as they are before the first one."""
        forget_moments(self._base)

    def _keys(self) -> tuple[str, ...]:
        return ("master", *MOMENTS) if self._base.state else ("master",)

    def _step(self) -> float:
        return max(float(state["step"]) for state in self._base.state.values())

    # ------------------------------------------------------------------ one piece on this rank

    def _place(self, parameter: Any) -> _Place | None:
        """Where the piece of this rank stands in the whole; None: there is none."""
        if hasattr(parameter, "ds_id"):
            piece = int(parameter.ds_tensor.ds_numel)
            start = dist.rank() * piece
            numel = min(piece, int(parameter.ds_numel) - start)  # the last one is padded
            return _Place(start, numel) if numel > 0 else None
        if not hasattr(parameter, "_hp_mapping"):
            return _Place(0, parameter.numel())
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address = mapping.lp_fragment_address
        return _Place(int(address.start), int(address.numel))

    def _read(self, parameter: Any, key: str) -> torch.Tensor:
        """The piece of this rank, flat; under stage 3 with its padding."""
        if hasattr(parameter, "ds_id"):
            state_key = None if key == "master" else key
            piece: torch.Tensor = self._zero.get_local_fp32_param(parameter, state_key).detach()
            return piece
        return self._view(parameter, key)

    def _view(self, parameter: Any, key: str) -> torch.Tensor:
        """The piece itself, for writing too; stages 0 to 2."""
        holder, first, numel = self._masters.get(parameter, parameter), 0, parameter.numel()
        if hasattr(parameter, "_hp_mapping"):
            # By the flat partition: DeepSpeed's own table of moments knows the first group only,
            # for it is made when that one is updated.
            mapping = parameter._hp_mapping
            holder = _flat_masters(self._zero)[mapping.param_group_index]
            address = mapping.get_hp_fragment_address()
            first, numel = int(address.start), int(address.numel)
        whole = holder if key == "master" else self._base.state[holder][key]
        return whole.data.view(-1).narrow(0, first, numel)  # type: ignore[no-any-return]

    def _write(self, parameter: Any, key: str, whole: torch.Tensor) -> None:
        place = self._place(parameter)
        if hasattr(parameter, "ds_id"):
            start, numel = place or (0, 0)
            piece = torch.zeros(int(parameter.ds_tensor.ds_numel))
            piece[:numel] = whole[start : start + numel]
            state_key = None if key == "master" else key
            self._zero.set_local_hp_param(piece, parameter, state_key)
        elif place is not None:
            self._view(parameter, key).copy_(whole[place.start : place.start + place.numel])

    def _gather(self, parameter: Any, key: str) -> torch.Tensor:
        """Put the pieces together: each rank adds its own to zeros, as integers, so bit for bit."""
        shape, place = whole_shape(parameter), self._place(parameter)
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=parameter.device)
        if place is not None:
            whole[place.start : place.start + place.numel] = self._read(parameter, key)[
                : place.numel
            ]
        sharded = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
        if sharded:
            dist.all_sum(whole.view(torch.int32))
        return whole.view(shape)

    def _make_moments(self) -> None:
        """Zero moments where there was no update yet, as the first one would make them."""
        whole = [self._masters.get(p, p) for p in self._trained.values()]
        for holder in _flat_masters(self._zero) or whole:
            if not self._base.state.get(holder):
                plain = type(self._base).__module__.startswith("torch.")
                self._base.state[holder] = {
                    "step": torch.zeros((), device=holder.device) if plain else 0,
                    **{key: torch.zeros_like(holder) for key in MOMENTS},
                }


def _flat_masters(zero: Any) -> list[torch.Tensor]:
    """The flat partitions that the torch optimizer updates; none at stage 0."""
    for name in (
        "fp32_partitioned_groups_flat",  # stage 3
        "single_partition_of_fp32_groups",  # 1 and 2
        "fp32_groups_flat_partition",  # 1, where a user's JSON adds gradients up in float32
    ):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    return []
