"""Queries, keys and values of a layer, in the ways that architectures make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from posttrain_dist.models.network.tensors import Linear
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.layers.row_attention import Heads

Project = Callable[[Graph, Value, Linear], Value]
Norm = Callable[[Graph, Value, str], Value]


def fused(
    graph: Graph, x: Value, heads: Heads, linear: Linear, project: Project, *, selects: bool
) -> tuple[Value, Value, Value]:
    """One product for all three.

    Args:
        selects: they are taken out by index (Persimmon), not split.
    """
    widths = (heads.num * heads.width, heads.num_kv * heads.width, heads.num_kv * heads.value_width)
    joined = project(graph, x, linear)
    row = joined.num_bytes // sum(widths)
    sizes = [width * row for width in widths]
    if selects:
        q, k, v = (graph.part(joined, size) for size in sizes)
    else:
        q, k, v = graph.split(joined, sizes)
    return q, k, v


def latent(
    graph: Graph,
    x: Value,
    heads: Heads,
    inputs: Sequence[Linear],
    rope_width: int,
    project: Project,
    norm: Norm,
    turn: Callable[[Graph, Value], Value],
) -> tuple[Value, Value, Value]:
    """Multi-head latent attention: queries, keys and values from narrow states (DeepSeek-V2, 2.1).

    Args:
        rope_width: of a head, the part that positions turn; keys share one such part.
    """
    *narrow_q, wide_q = [linear for linear in inputs if ".q_" in linear.name]
    narrow_kv, wide_kv = [linear for linear in inputs if ".kv_" in linear.name]
    states = x
    for linear in narrow_q:
        states = norm(graph, project(graph, x, linear), "self_attn.q_a_layernorm")
    q = project(graph, states, wide_q)
    states = project(graph, x, narrow_kv)
    kept = wide_kv.in_features
    row = states.num_bytes // narrow_kv.out_features
    states, shared = graph.split(states, [kept * row, rope_width * row])
    states = norm(graph, states, "self_attn.kv_a_layernorm")
    kv = project(graph, states, wide_kv)
    still = heads.width - rope_width
    row_q, row_kv = q.num_bytes // heads.width, kv.num_bytes // (still + heads.value_width)
    q_still, q_turned = graph.split(q, [still * row_q, rope_width * row_q])
    k_still, v = graph.split(kv, [still * row_kv, heads.value_width * row_kv])
    q_turned, shared = turn(graph, q_turned), turn(graph, shared)
    q = graph.join([q_still, q_turned])
    k = graph.op((k_still, shared), heads.num * heads.width * row, grad_bytes=None, width=q.width)
    return q, k, v
