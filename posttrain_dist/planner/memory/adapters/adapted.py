"""A linear layer with an adapter, or in NF4, as operations: what `peft` 0.21 and bitsandbytes do.

Vectors as long as a row of a weight are left out where they only pass by.
"""

from __future__ import annotations

from posttrain_dist.models.network.tensors import Linear
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.adapters.dora import dora_change
from posttrain_dist.planner.memory.adapters.frozen import base_linear
from posttrain_dist.planner.memory.adapters.placed import ia3_targets, lora_targets, on_nf4
from posttrain_dist.planner.memory.adapters.products import dropout, low_rank
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.plan import Item
from posttrain_dist.tuning.lora import Lora


def adapted_linear(graph: Graph, job: Job, linear: Linear, name: str, x: Value) -> Value | None:
    """The output of a linear layer that an adapter changes, or whose weight is in NF4.

    Args:
        linear: of a decoder layer.
        name: in the causal LM: model.layers.0.self_attn.q_proj.
        x: its input, which stays the caller's.

    Returns:
        None: neither is so, and the plain program runs.
    """
    outputs, inputs = ia3_targets(job)
    if name in lora_targets(job):
        return _lora(graph, job, linear, name, x)
    if name in outputs:
        result = base_linear(graph, job, linear, f"{name}.base_layer", x)
        scaled = _scaled(graph, job, name, result)
        graph.drop(result)
        return scaled
    if name in inputs:
        scaled = _scaled(graph, job, name, x)
        result = base_linear(graph, job, linear, f"{name}.base_layer", scaled)
        graph.drop(scaled)
        return result
    return base_linear(graph, job, linear, name, x) if on_nf4(job) else None


def _scaled(graph: Graph, job: Job, name: str, x: Value) -> Value:
    """`x` times the trained vector of IA3; the vector's gradient is summed of a whole product."""
    outputs, inputs = ia3_targets(job)
    width = outputs[name].out_features if name in outputs else inputs[name].in_features
    vector = f"{name}.ia3_l.default"
    return graph.op(
        [x],
        x.num_bytes,
        saves=[x],
        backward_temporary=x.num_bytes,
        parameters=[(vector, width * job.value_bytes)],
        gathers=[vector],
        item=Item.adapter_activations,
        temporary_item=Item.adapter_activations,
    )


def _lora(graph: Graph, job: Job, linear: Linear, name: str, x: Value) -> Value:
    """W x + scale B A x, of which W x, B A x, its multiple and the sum are apart at first."""
    tuning = job.tuning
    assert isinstance(tuning, Lora)
    result = base_linear(graph, job, linear, f"{name}.base_layer", x)
    if on_nf4(job):  # peft copies it
        result = graph.join([result])
    dropped = dropout(graph, job, x) if tuning.dropout else graph.view(x)
    if tuning.dora:
        change = dora_change(graph, job, linear, name, dropped, result)
    else:
        product = low_rank(graph, job, linear, name, dropped)
        change = graph.op([product], product.num_bytes, item=Item.adapter_activations)
        graph.drop(product)
    graph.drop(dropped)
    total = graph.add(result, change)
    graph.drop(result, change)
    return total
