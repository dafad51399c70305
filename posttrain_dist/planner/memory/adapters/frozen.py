"""The frozen linear layer inside of an adapter, whose weight may be in NF4."""

from __future__ import annotations

from posttrain_dist.models.network.tensors import Linear
from posttrain_dist.models.quantized import BLOCK
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.adapters.placed import on_nf4
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.plan import Item


def base_linear(graph: Graph, job: Job, linear: Linear, name: str, x: Value) -> Value:
    """The layer with its frozen weight; in NF4 that is made whole, in forward and in backward.

    bitsandbytes keeps nothing but the packed weight (`MatMul4Bit`). For few rows it has kernels on
    GPUs that make no weight; a packed row of training is longer.
    """
    whole = dequantised_bytes(job, linear) if on_nf4(job) else 0
    scales = linear.in_features * linear.out_features // BLOCK * 4 if whole else 0
    return graph.op(
        [x],
        x.size // linear.in_features * linear.out_features * x.width,
        temporary=whole + scales * (2 if job.on_gpu else 1),
        backward_temporary=whole,
        gathers=[f"{name}.{tensor.name.rpartition('.')[2]}" for tensor in linear.tensors],
        temporary_item=Item.dequantised,
        viewed=not whole,
    )


def dequantised_bytes(job: Job, linear: Linear) -> int:
    """Of a weight as it is computed with."""
    return linear.in_features * linear.out_features * job.value_bytes
