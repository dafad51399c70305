"""What LoRA computes beside the frozen layer."""

from __future__ import annotations

from posttrain_dist.models.network.tensors import Linear
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.plan import Item
from posttrain_dist.tuning.lora import Lora


def low_rank(graph: Graph, job: Job, linear: Linear, name: str, x: Value) -> Value:
    """B A x."""
    tuning, value = job.tuning, job.value_bytes
    assert isinstance(tuning, Lora)
    rows = x.size // linear.in_features
    a, b = (f"{name}.lora_{matrix}.default.weight" for matrix in "AB")
    low = graph.op(
        [x],
        rows * tuning.rank * value,
        saves=[x] if tuning.trained(a) else [],
        parameters=[(a, tuning.rank * linear.in_features * value)] if tuning.trained(a) else [],
        gathers=[a],
        viewed=True,
        item=Item.adapter_activations,
    )
    product = graph.op(
        [low],
        rows * linear.out_features * value,
        saves=[low],
        parameters=[(b, tuning.rank * linear.out_features * value)],
        gathers=[b],
        viewed=True,
        item=Item.adapter_activations,
    )
    graph.drop(low)
    return product


def dropout(graph: Graph, job: Job, x: Value) -> Value:
    """On a GPU a byte for each number is kept, on a CPU the factor itself."""
    if not graph.drops:
        return graph.view(x)
    mask = x.num_bytes // job.value_bytes if job.on_gpu else x.num_bytes
    if graph.recording and x.needs_grad:
        return graph.op([x], x.num_bytes, saves_bytes=mask, item=Item.adapter_activations)
    return graph.op(
        [x],
        x.num_bytes,
        temporary=mask,
        item=Item.adapter_activations,
        temporary_item=Item.adapter_activations,
    )
