"""One decoder layer: norms, attention, MLP and residuals in the order of its architecture."""

from __future__ import annotations

from posttrain_dist.models.architectures.known import KEEPS_ROWS
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.layers.features import features_of
from posttrain_dist.planner.memory.layers.parts import Part
from posttrain_dist.planner.memory.layers.row_attention import Heads
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
    heads = _heads(job, index)
    prefix = f"{network.layers_name}.{index}."
    return Part(job, network.layers[index], prefix, heads, features_of(job))


def _heads(job: Job, index: int) -> Heads:
    """By the projections of the layer itself, where it has one each."""
    shape = job.network.shape
    outputs = {x.name.rpartition(".")[2]: x.out_features for x in job.network.layers[index].linears}
    num, num_kv = shape.num_heads, shape.num_kv_heads
    width = value_width = shape.head_dim
    if "kv_b_proj" in outputs:
        num_kv, width, value_width = num, shape.widest_head, shape.value_head_dim
    elif "q_proj" in outputs and "k_proj" in outputs:
        width = value_width = outputs["q_proj"] // num
        num_kv = outputs["k_proj"] // width
    return Heads(
        num=num,
        num_kv=num_kv,
        width=width,
        value_width=value_width,
        window=window_of(job, index),
        softcap=bool(shape.attention_softcap),
        prefix_tokens=job.tuning.tokens if isinstance(job.tuning, Prefix) else 0,
    )


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
    kept = h if part.features.keeps_attention else None
    del h
    h = part.norm(graph, x, before_mlp) if before_mlp else x
    h = _mlp(graph, part, h, supervised)
    if after_mlp:
        h = part.norm(graph, h, after_mlp)
    x = graph.add(x, h)
    del kept, h
    if part.linears("layer"):
        x = part.per_layer_input(graph, x)
    return _leave(graph, part, x, supervised)


def _parallel(graph: Graph, part: Part, x: Value, supervised: int | None) -> Value:
    first, *others = [name for name in part.norms if "norm" in name or name.startswith("ln_")]
    second = next((name for name in others if name.startswith("post_attention")), "")
    h = part.norm(graph, x, first)
    mixed = part.attention(graph, h)
    h = part.norm(graph, x, second) if second else h
    changed = _mlp(graph, part, h, supervised)
    total = graph.add(changed, mixed)
    del changed, mixed
    return _leave(graph, part, graph.add(total, x), supervised)


def _mlp(graph: Graph, part: Part, h: Value, supervised: int | None) -> Value:
    """Of the supervised rows alone, whose outputs are then laid out over all rows."""
    whole = not any(linear.name.startswith("mlp.") for linear in part.layer.linears)
    if supervised is None or whole:  # a layer without a module `mlp` runs on all rows
        return part.mlp(graph, h)
    row = part.job.network.shape.hidden_size * h.width
    out = part.mlp(graph, take_rows(graph, h, supervised * row))
    return take_rows(graph, out, h.num_bytes)


def _leave(graph: Graph, part: Part, x: Value, supervised: int | None) -> Value:
    if supervised is None or part.job.network.shape.model_type in KEEPS_ROWS:
        return x
    return take_rows(graph, x, supervised * part.job.network.shape.hidden_size * x.width)


def _norm_names(part: Part) -> tuple[str, str, str, str]:
    """Before and after attention, before and after the MLP; empty: there is none."""
    if part.features.weightless:
        return "input_layernorm", "", "post_attention_layernorm", ""
    names = [name for name in part.norms if "." not in name]
    if len(names) >= 4:
        first, second, third, fourth = names[:4]
        return first, second, third, fourth
    if names and names[0].startswith("post_attention"):  # OLMo-2: behind the branches only
        return "", names[0], "", names[1]
    first, second = (*names, "", "")[:2]
    return first, "", second, ""
