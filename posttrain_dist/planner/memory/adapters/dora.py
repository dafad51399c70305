"""DoRA as `peft` 0.21 computes it: what is added to W x so that each row of W has its length m.

    (m / n - 1) W x + scale (m / n) B A x,    n = |W + scale B A| of each row

B A is made whole each time, as (B (A 1))ᵀ with a unit matrix of the input's width.
"""

from __future__ import annotations

from posttrain_dist.models.network.tensors import Linear
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.adapters.frozen import dequantised_bytes
from posttrain_dist.planner.memory.adapters.placed import on_nf4
from posttrain_dist.planner.memory.adapters.products import low_rank
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.plan import Item
from posttrain_dist.tuning.lora import Lora

_KEPT = Item.adapter_activations


def dora_change(
    graph: Graph, job: Job, linear: Linear, name: str, x: Value, result: Value
) -> Value:
    """What is added to `result`, which is W x, and of what dropout leaves of it if there is any."""
    tuning = job.tuning
    assert isinstance(tuning, Lora)
    weight, ledger = dequantised_bytes(job, linear), graph.ledger
    unit = linear.in_features**2 * job.value_bytes
    low = linear.in_features * tuning.rank * job.value_bytes
    held = [ledger.allocate(_KEPT, unit + low + weight)]  # 1, A 1, B A 1
    whole = graph.tensor(weight, Item.dequantised) if on_nf4(job) else None
    ledger.touch(_KEPT, 2 * weight)  # scale B A, W + scale B A
    product = low_rank(graph, job, linear, name, x)
    base = _base(graph, job, linear, x, result, whole)
    vector = f"{name}.lora_magnitude_vector.default.weight"
    length = [(vector, linear.out_features * job.value_bytes)]
    parts = []
    for factor, parameters in ((base, length), (product, [])):
        parts.append(
            graph.op(
                [factor],
                factor.num_bytes,
                saves=[factor],
                # Of the gradient of m, before it is summed over the rows.
                backward_temporary=factor.num_bytes,
                parameters=parameters,
                gathers=[vector],
                item=_KEPT,
                temporary_item=_KEPT,
            )
        )
    scaled = graph.op([parts[1]], product.num_bytes, item=_KEPT)
    graph.drop(parts[1])
    change = graph.add(parts[0], scaled)
    graph.drop(parts[0], scaled, product, base, *([] if whole is None else [whole]))
    for block in held:
        ledger.release(block)
    return change


def _base(
    graph: Graph, job: Job, linear: Linear, x: Value, result: Value, whole: Value | None
) -> Value:
    """W x without bias; of a dropped x by a product of its own, which keeps the weight."""
    tuning = job.tuning
    assert isinstance(tuning, Lora)
    if not tuning.dropout:
        if not linear.bias:
            return graph.view(result)
        return graph.op([result], result.num_bytes, item=_KEPT)
    num_bytes = x.size // linear.in_features * linear.out_features * job.value_bytes
    saves = [] if whole is None else [whole]
    return graph.op([x], num_bytes, saves=saves, item=_KEPT, viewed=True)
