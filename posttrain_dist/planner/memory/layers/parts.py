"""The parts of a decoder layer: norms, projections, attention block and MLP."""

from __future__ import annotations

from dataclasses import dataclass, field

from posttrain_dist.models.network.tensors import Layer, Linear
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory import operations
from posttrain_dist.planner.memory.adapters.adapted import adapted_linear
from posttrain_dist.planner.memory.adapters.bottleneck_program import adapted_sublayer
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.layers.attention import Heads, attend, gated, rotate
from posttrain_dist.planner.memory.layers.features import (
    COHERE,
    FUSED_RMS,
    LAYER,
    RMS_LATE,
    RMS_PLUS_ONE,
    Features,
)


@dataclass(slots=True)
class Part:
    """One layer of a job, as its program reads it.

    Attributes:
        prefix: of the names of its parameters: "model.layers.3.".
        norms: its norms by name, without "weight".
    """

    job: Job
    layer: Layer
    prefix: str
    heads: Heads
    features: Features
    norms: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        ends = ".weight"
        sizes = {tensor.name: tensor.size for tensor in self.layer.others}
        self.norms = {
            name.removesuffix(ends): n for name, n in sizes.items() if name.endswith(ends)
        }

    def linears(self, part: str) -> list[Linear]:
        """Those of `attention` or `mlp`, the one that leads out of it last."""
        return [linear for linear in self.layer.linears if linear.part == part]

    # -------------------------------------------------------------------------------- norms

    def norm(self, graph: Graph, x: Value, name: str) -> Value:
        """The norm of that name over its rows."""
        row = self.norms.get(name, self.job.network.shape.hidden_size)
        return norm(graph, x, f"{self.prefix}{name}.weight", row, self.features, self.layer)

    def project(self, graph: Graph, x: Value, linear: Linear) -> Value:
        """x through a linear layer, and what an adapter does beside it."""
        name = f"{self.prefix}{linear.name}"
        adapted = adapted_linear(graph, self.job, linear, name, x)
        return operations.linear(graph, x, linear, name) if adapted is None else adapted

    # ---------------------------------------------------------------------------- attention

    def attention(self, graph: Graph, x: Value) -> Value:
        """Attention, and what an adapter adds."""
        out = self._attention(graph, x)
        return adapted_sublayer(graph, self.job, self.prefix, "attention", x, out)

    def _attention(self, graph: Graph, x: Value) -> Value:
        """Queries, keys and values, positions, attention, output projection."""
        *inputs, output = self.linears("attention")
        q, k, v = self._queries_keys_values(graph, x, inputs)
        q, k = self._head_norm(graph, q, "q"), self._head_norm(graph, k, "k")
        # In one statement: both are there until both are turned.
        share = self.features.rotary
        q, k = rotate(graph, q, share=share), rotate(graph, k, share=share)
        mixed = attend(graph, self.job, self.heads, q, k, v)
        return self.project(graph, mixed, output)

    def _queries_keys_values(
        self, graph: Graph, x: Value, inputs: list[Linear]
    ) -> tuple[Value, Value, Value]:
        if len(inputs) == 3:
            q, k, v = (self.project(graph, x, linear) for linear in inputs)
            return q, k, v
        heads = self.heads
        widths = (
            heads.num * heads.width,
            heads.num_kv * heads.width,
            heads.num_kv * heads.value_width,
        )
        joined = self.project(graph, x, inputs[-1])
        row = joined.num_bytes // sum(widths)
        q, k, v = graph.split(joined, [width * row for width in widths])
        return q, k, v

    def _head_norm(self, graph: Graph, x: Value, which: str) -> Value:
        name = next(
            (n for n in self.norms if f"{which}_norm" in n or f"{which}_layernorm" in n), ""
        )
        return self.norm(graph, x, name) if name else x

    # ---------------------------------------------------------------------------------- mlp

    def mlp(self, graph: Graph, x: Value) -> Value:
        """Gated, or plain, and what an adapter adds."""
        out = self._mlp(graph, x)
        return adapted_sublayer(graph, self.job, self.prefix, "mlp", x, out)

    def _mlp(self, graph: Graph, x: Value) -> Value:
        *inputs, output = self.linears("mlp")
        activation = self.features.activation
        if len(inputs) == 2:  # gate, up
            first, second = inputs
            gate = operations.activation(graph, self.project(graph, x, first), activation)
            inner = operations.multiply(graph, gate, self.project(graph, x, second))
            del gate
            return self.project(graph, inner, output)
        inner = self.project(graph, x, inputs[0])
        if inputs[0].out_features == 2 * output.in_features:
            gate, up = graph.split(inner, [inner.num_bytes // 2] * 2)
            del inner
            inner = gated(graph, gate, up, activation)
        else:
            inner = operations.activation(graph, inner, activation)
        return self.project(graph, inner, output)


def norm(
    graph: Graph, x: Value, parameter: str, row: int, features: Features, layer: Layer | None = None
) -> Value:
    """A norm of the kind of an architecture."""
    kind = features.norm
    if kind in (LAYER, FUSED_RMS):
        return operations.layer_norm(graph, x, parameter, row)
    if kind == COHERE:
        return operations.rms_norm(graph, x, parameter, row, late=True)
    return operations.rms_norm(
        graph, x, parameter, row, plus_one=kind == RMS_PLUS_ONE, late=kind == RMS_LATE
    )
