"""The nouns: a network as the tensors and linear layers that it has. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from posttrain_dist.models.shape import ModelShape


def part_of(name: str) -> str:
    """Where a linear stands, by its name inside a decoder layer: attention, mlp or layer."""
    *path, last = name.split(".")
    if any("attn" in one or "attention" in one for one in path):
        return "attention"
    return "mlp" if "mlp" in path or (not path and last in ("fc1", "fc2")) else "layer"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A parameter, by its name in the causal LM (or in its layer)."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, as `tuning/injection/targets.py` finds it.

    Attributes:
        name: in its layer (self_attn.q_proj), or in the causal LM.
        part: attention, mlp or layer inside a decoder layer, or outside.
        transposed: its weight is [in, out], as in GPT-2's Conv1D.
    """

    name: str
    in_features: int
    out_features: int
    part: str
    bias: bool = False
    transposed: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Weight and bias."""
        sizes = (self.out_features, self.in_features)
        weight = Tensor(f"{self.name}.weight", sizes[::-1] if self.transposed else sizes)
        bias = (Tensor(f"{self.name}.bias", (self.out_features,)),) if self.bias else ()
        return (weight, *bias)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: its linears, and its other parameters (norms, scales)."""

    linears: tuple[Linear, ...]
    others: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All parameters, linears first."""
        return (*(t for linear in self.linears for t in linear.tensors), *self.others)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(tensor.size for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Network:
    """A dense causal LM. Equal to itself alone, so that it is a key.

    Attributes:
        config: of config.json, with the vocabulary that added tokens make of it.
        layers: first to last; those that are alike are the same object.
        layers_name: prefix of layer i is f"{layers_name}.{i}.".
        before: parameters in front of the layers: embeddings, positions.
        after: behind them: the final norm; not the head.
        head: of an untied model its parameters; of a tied one only those of its own (a bias).
        outside: linears that are in no decoder layer, by their names in the causal LM, the head
            among them; their parameters are in `before` and `head`.
        buffer_bytes: of tensors that are no parameters, where they are large.
    """

    shape: ModelShape
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    layers_name: str
    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    head: tuple[Tensor, ...]
    outside: tuple[Linear, ...]
    buffer_bytes: int = 0

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, by its whole name."""
        for i, layer in enumerate(self.layers):
            for linear in layer.linears:
                yield replace(linear, name=f"{self.layers_name}.{i}.{linear.name}")
        yield from self.outside

    def tensors(self) -> Iterator[Tensor]:
        """Every parameter once, by its whole name."""
        yield from self.before
        for i, layer in enumerate(self.layers):
            for tensor in layer.tensors:
                yield Tensor(f"{self.layers_name}.{i}.{tensor.name}", tensor.shape)
        yield from self.after
        yield from self.head

    @property
    def num_parameters(self) -> int:
        """All parameters, a shared one once."""
        return _count_parameters(self)


@lru_cache(maxsize=1)
def _count_parameters(network: Network) -> int:
    outside = sum(tensor.size for tensor in (*network.before, *network.after, *network.head))
    return outside + sum(layer.size for layer in network.layers)
