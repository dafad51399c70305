"""One decoder layer: norms, attention, MLP and residuals in the order of its architecture."""

from __future__ import annotations

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.layers.attention import Heads
from posttrain_dist.planner.memory.layers.features import features_of
from posttrain_dist.planner.memory.layers.parts import Part
from posttrain_dist.planner.memory.operations import take_rows
from posttrain_dist.tuning.prefix_tuning import Prefix


def run_layer(graph: Graph, job: Job, index: int, x: Value, supervised: int | None) -> Value:
    """Hidden states behind layer `index`.

    Args:
        supervised: of the last layer the rows that leave it, and that its MLP computes; None: all.
    """
    part = part_of(job, index)
    if part.features.parallel:
        return _parallel(graph, part, x, supervised)
    return _sequential(graph, part, x, supervised)


def part_of(job: Job, index: int) -> Part:
    """The layer, with its names and heads."""
    network = job.network
    shape = network.shape
    heads = Heads(
        num=shape.num_heads,
        num_kv=shape.num_kv_heads,
        width=shape.head_dim,
        value_width=shape.head_dim,
        window=window_of(job, index),
        softcap=bool(shape.attention_softcap),
        prefix_tokens=job.tuning.tokens if isinstance(job.tuning, Prefix) else 0,
    )
    prefix = f"{network.layers_name}.{index}."
    return Part(job, network.layers[index], prefix, heads, features_of(job))


def window_of(job: Job, index: int) -> int | None:
    """Tokens that a token of the layer attends to, where that is less than a sample has."""
    window = job.network.shape.window_L[index]
    kernels = job.attention in ("varlen", "flash")
    return None if kernels or window is None or window >= job.sample_tokens else window


def _sequential(graph: Graph, part: Part, x: Value, supervised: int | None) -> Value:
    before, after_attention, before_mlp, after_mlp = _norm_names(part)
    h = part.norm(graph, x, before) if before else x
    h = part.attention(graph, h)
    if after_attention:
        h = part.norm(graph, h, after_attention)
    x = graph.add(x, h)
    del h
    h = part.norm(graph, x, before_mlp) if before_mlp else x
    h = _mlp(graph, part, h, supervised)
    if after_mlp:
        h = part.norm(graph, h, after_mlp)
    return _leave(graph, part, graph.add(x, h), supervised)


def _parallel(graph: Graph, part: Part, x: Value, supervised: int | None) -> Value:
    first, *others = [name for name in part.norms if "norm" in name or name.startswith("ln_")]
    second = next((name for name in others if name.startswith("post_attention")), "")
    h = part.norm(graph, x, first)
    mixed = part.attention(graph, h)
    h = part.norm(graph, x, second) if second else h
    changed = _mlp(graph, part, h, supervised)
    return _leave(graph, part, graph.add(graph.add(changed, mixed), x), supervised)


def _mlp(graph: Graph, part: Part, h: Value, supervised: int | None) -> Value:
    """Of the supervised rows alone, whose outputs are then laid out over all rows."""
    if supervised is None:
        return part.mlp(graph, h)
    row = part.job.network.shape.hidden_size * h.width
    out = part.mlp(graph, take_rows(graph, h, supervised * row))
    return take_rows(graph, out, h.num_bytes)


def _leave(graph: Graph, part: Part, x: Value, supervised: int | None) -> Value:
    if supervised is None:
        return x
    return take_rows(graph, x, supervised * part.job.network.shape.hidden_size * x.width)


def _norm_names(part: Part) -> tuple[str, str, str, str]:
    """Before and after attention, before and after the MLP; empty: there is none."""
    names = [name for name in part.norms if "." not in name]
    if len(names) >= 4:
        first, second, third, fourth = names[:4]
        return first, second, third, fourth
    if names and names[0].startswith("post_attention"):  # OLMo-2: behind the branches only
        return "", names[0], "", names[1]
    first, second = (*names, "", "")[:2]
    return first, "", second, ""
