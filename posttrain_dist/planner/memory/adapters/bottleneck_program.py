"""A bottleneck adapter behind a sublayer, or beside it: `tuning/bottleneck/bottleneck_layer.py`."""

from __future__ import annotations

from posttrain_dist.models.network.tensors import Linear
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.adapters.inserted import bottleneck_places, bottleneck_width
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.operations import activation, linear, scale
from posttrain_dist.planner.plan import Item
from posttrain_dist.tuning.bottleneck.bottleneck_tuning import Bottleneck, Placement


def adapted_sublayer(
    graph: Graph, job: Job, layer: str, part: str, x: Value, output: Value
) -> Value:
    """The output of attention or MLP with what its adapter adds, if it has one.

    Args:
        layer: prefix of the names of its parameters: "model.layers.3.".
        part: attention or mlp.
        x: input of the sublayer.
    """
    tuning = job.tuning
    if not isinstance(tuning, Bottleneck):
        return output
    places = bottleneck_places(job, tuning)
    if part == "attention" and len(places) == 1:
        return output
    name = f"{layer}{places[0] if part == 'attention' else places[-1]}.bottleneck"
    hidden, width = job.network.shape.hidden_size, bottleneck_width(job, tuning)
    graph.item, before = Item.adapter_activations, graph.item
    source = x if tuning.placement is Placement.parallel else output
    down = Linear("down", hidden, width, part, bias=True)
    up = Linear("up", width, hidden, part, bias=True)
    inner = linear(graph, source, down, f"{name}.down")
    inner = activation(graph, inner, tuning.nonlinearity.name)
    added = linear(graph, inner, up, f"{name}.up")
    graph.drop(inner)
    added = scale(graph, added)
    total = graph.add(output, added)
    graph.item = before
    return total
