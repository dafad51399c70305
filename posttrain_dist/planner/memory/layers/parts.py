"""The parts of a decoder layer: norms, projections, attention block and MLP."""

from __future__ import annotations

from dataclasses import dataclass, field

from posttrain_dist.models.network.tensors import Layer, Linear
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory import operations
from posttrain_dist.planner.memory.adapters.adapted import adapted_linear
from posttrain_dist.planner.memory.adapters.bottleneck_program import adapted_sublayer
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.layers.features import (
    COHERE,
    LAYER,
    RMS_LATE,
    RMS_PLUS_ONE,
    Features,
)
from posttrain_dist.planner.memory.layers.projections import fused, latent
from posttrain_dist.planner.memory.layers.row_attention import Heads, attend, gated, rotate


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
        parameter = f"{self.prefix}{name}.weight" if name in self.norms else ""
        return norm(graph, x, parameter, row, self.features)

    def inner_norm(self, graph: Graph, x: Value, ending: str) -> Value:
        """The norm in front of an output projection, where there is one (BitNet)."""
        name = next((name for name in self.norms if name.endswith(ending)), "")
        return self.norm(graph, x, name) if name else x

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
        if any(".kv_" in linear.name for linear in inputs):
            q, k, v = self._latent(graph, x, inputs)
        else:
            q, k, v = self._turned(graph, x, inputs)
        out = self._attend(graph, q, k, v)
        del q, k, v
        out = self.inner_norm(graph, out, "attn_sub_norm")
        return self.drop_out(graph, self.project(graph, out, output))

    def _turned(self, graph: Graph, x: Value, inputs: list[Linear]) -> tuple[Value, Value, Value]:
        features = self.features
        if len(inputs) == 1:
            selects = self.job.network.shape.model_type == "persimmon"
            q, k, v = fused(graph, x, self.heads, inputs[0], self.project, selects=selects)
        else:
            found = [self.project(graph, x, linear) for linear in inputs]
            q, k, v = found[0], found[1], found[-1]
            del found
        q, k = self._head_norm(graph, q, "q"), self._head_norm(graph, k, "k")
        if features.value_norm:
            v = norm(graph, v, "", self.heads.value_width, features)
        share, wide = features.rotary, features.wide_rotary
        angles = self._angles(graph, x)
        # In one statement: both are there until both are turned.
        q, k = (
            rotate(graph, q, share=share, wide=wide, angles=angles),
            rotate(graph, k, share=share, wide=wide, angles=angles),
        )
        if features.head_norms:
            row = self.heads.width
            q, k = (norm(graph, x, "", row, features) for x in (q, k))
        return q, k, v

    def _latent(self, graph: Graph, x: Value, inputs: list[Linear]) -> tuple[Value, Value, Value]:
        width = int(self.job.network.config.get("qk_rope_head_dim") or 0) or self.heads.width // 3
        return latent(graph, x, self.heads, inputs, width, self.project, self.norm, rotate)

    def _attend(self, graph: Graph, q: Value, k: Value, v: Value) -> Value:
        if self.job.network.shape.model_type != "diffllama":
            return attend(graph, self.job, self.heads, q, k, v)
        # Differential attention: twice, with each half of the values for all heads.
        halves = [
            graph.op((half,), v.num_bytes, width=v.width)
            for half in graph.split(v, [v.num_bytes // 2] * 2)
        ]
        both = [attend(graph, self.job, self.heads, q, k, half) for half in halves]
        first, second = graph.split(graph.join(both), [both[0].num_bytes] * 2)
        del both
        second = operations.weigh(graph, second, f"{self.prefix}self_attn.lambda_q1", 1)
        out = graph.add(first, second)
        out = norm(graph, out, "", 2 * self.heads.width, self.features)
        return operations.scale(graph, out)

    def _angles(self, graph: Graph, x: Value) -> tuple[Value, ...]:
        """Cosines and sines of this layer alone; none where the backbone has made them for all."""
        if not self.features.own_angles:
            return ()
        num_tokens = x.size // self.job.network.shape.hidden_size
        width = round(self.heads.width * self.features.rotary)
        return tuple(graph.tensor(num_tokens * width * x.width, width=x.width) for _ in range(2))

    def drop_out(self, graph: Graph, x: Value) -> Value:
        """What leaves a branch, where the architecture drops it out."""
        if not self.features.dropout:
            return x
        return operations.dropout(graph, x, on_gpu=self.job.on_gpu)

    def _head_norm(self, graph: Graph, x: Value, which: str) -> Value:
        word = {"q": "query", "k": "key"}[which]
        ends = (f"{which}_norm", f"{which}_layernorm", f"{word}_layernorm")
        name = next((n for n in self.norms if n.rpartition(".")[2] in ends), "")
        if name and self.features.norm == COHERE:  # a weight for each head, rows of one head
            name = f"{self.prefix}{name}.weight"
            return norm(graph, x, name, self.heads.width, self.features)
        return self.norm(graph, x, name) if name else x

    def per_layer_input(self, graph: Graph, x: Value) -> Value:
        """Gemma 4: what each layer is told of the tokens, gated by the hidden states."""
        gate, projection = self.linears("layer")
        h = operations.activation(graph, self.project(graph, x, gate), self.features.activation)
        given = graph.per_layer_inputs
        assert given is not None
        own = graph.part(given, given.num_bytes // len(self.job.network.layers))
        h = operations.multiply(graph, h, own)
        del own
        h = self.project(graph, h, projection)
        return graph.add(x, self.norm(graph, h, "post_per_layer_input_norm"))

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
            return self.project(graph, self.inner_norm(graph, inner, "ffn_sub_norm"), output)
        inner = self.project(graph, x, inputs[0])
        if inputs[0].out_features == 2 * output.in_features:
            gate, up = graph.split(inner, [inner.num_bytes // 2] * 2)
            del inner
            inner = gated(graph, gate, up, activation)
        elif activation == "xielu":
            inner = operations.xielu(graph, inner, f"{self.prefix}mlp.act_fn")
        else:
            inner = operations.activation(graph, inner, activation)
        return self.drop_out(graph, self.project(graph, inner, output))


def norm(graph: Graph, x: Value, parameter: str, row: int, features: Features) -> Value:
    """A norm of the kind of an architecture; without a name it has no weight."""
    kind = features.norm
    if kind == LAYER:
        return operations.layer_norm(graph, x, parameter, row)
    if kind == COHERE:
        return operations.centred_norm(graph, x, parameter, row)
    return operations.rms_norm(
        graph, x, parameter, row, plus_one=kind == RMS_PLUS_ONE, late=kind == RMS_LATE
    )
