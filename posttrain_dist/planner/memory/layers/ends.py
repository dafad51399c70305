"""What stands before the layers: the batch, embeddings, positions."""

from __future__ import annotations

import math

from posttrain_dist.models.network.tensors import Tensor
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.operations import WIDE, linear, rms_norm, scale
from posttrain_dist.planner.plan import Item

TARGET_MULTIPLE = 128  # data/packs/collate.py
_INDEX_BYTES = 8


def num_targets(job: Job) -> int:
    """Supervised tokens of the row, padded as `collate` pads them; a root's first is none."""
    most = job.row_tokens - job.row_roots
    found = min(math.ceil(job.row_tokens * job.supervised_share), most)
    return max(1, -(-found // TARGET_MULTIPLE)) * TARGET_MULTIPLE


def batch_bytes(job: Job) -> int:
    """Of one `Batch`: ids and positions; of targets place, label, channel, sample and numbers."""
    numbers = 1 + job.objective.model_fields
    of_target = 4 * _INDEX_BYTES + numbers * WIDE
    return 2 * _INDEX_BYTES * job.row_tokens + of_target * num_targets(job)


def causal_buffer_bytes(job: Job) -> int:
    """Of the mask for all positions that GPT-BigCode has as a buffer, a byte for each pair."""
    config = job.network.config
    if job.network.shape.model_type != "gpt_bigcode":
        return 0
    return int(config.get("n_positions") or 1024) ** 2


def embed(graph: Graph, table: Tensor, num_tokens: int) -> Value:
    """Rows of a table; its gradient is dense."""
    return graph.op(
        (),
        num_tokens * table.shape[1] * graph.width,
        parameters=((table.name, table.size * graph.width),) if table.name in graph.trained else (),
        gathers=(table.name,),
    )


def per_layer_inputs(graph: Graph, job: Job, x: Value) -> Value | None:
    """Gemma 4: what each layer is told of the tokens, from a table and from the embeddings."""
    network = job.network
    tables = [t for t in network.before if "per_layer" in t.name]
    if not tables:
        return None
    table, scales, _ = tables
    (projection,) = [one for one in network.outside if "per_layer" in one.name]
    given = scale(graph, embed(graph, table, job.row_tokens))
    projected = scale(graph, linear(graph, x, projection, projection.name))
    projected = rms_norm(graph, projected, scales.name, scales.size, late=True)
    return scale(graph, graph.add(projected, given))


def rotary(graph: Graph, num_tokens: int, width: int) -> tuple[Value, Value]:
    """Cosines and sines of the row, which every layer reads."""
    angles = graph.tensor(num_tokens * width * WIDE, width=WIDE)
    found = []
    for _ in range(2):
        wide = graph.tensor(num_tokens * width * WIDE, width=WIDE)
        graph.ledger.touch(Item.activations, wide.num_bytes)  # times the scaling of attention
        found.append(graph.tensor(num_tokens * width * graph.width))
        del wide
    del angles
    return found[0], found[1]
