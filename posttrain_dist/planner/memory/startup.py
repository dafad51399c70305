"""What the start-up check of the head allocates: `models/parity.py` on the first batch."""

from __future__ import annotations

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.adapters.head_weight import head_weight
from posttrain_dist.planner.memory.autograd import Graph
from posttrain_dist.planner.memory.layers.ends import num_targets
from posttrain_dist.planner.memory.layers.output_head import HeadSize, made_weight
from posttrain_dist.planner.memory.operations import WIDE
from posttrain_dist.planner.plan import Item

MAX_ROWS = 256  # models/parity.py


def check_parity(graph: Graph, job: Job, name: str, *, fast: bool) -> None:
    """Fused, eager and reference loss of some rows, with the gradient of a weight that is trained.

    On a GPU without room for the reference, that runs in host memory: no run needs the room.

    Args:
        name: of the head's weight.
    """
    ledger, shape, width = graph.ledger, job.network.shape, graph.width
    rows = min(num_targets(job), MAX_ROWS)
    made = head_weight(job, name)
    names, more = ((name,), 0) if made is None else (made.names, made.columns)
    trained = name in graph.trained or made is not None
    weights = shape.vocab_size * (shape.hidden_size + more)
    logits = rows * shape.vocab_size * WIDE
    graph.shards.gather(names, backward=False)
    size = HeadSize(job, width, rows, trained=trained, fast=fast, more_columns=more)
    held = [ledger.allocate(Item.head, size.hidden_bytes), *made_weight(graph, job, rows, made)]
    held.append(ledger.allocate(Item.head, size.weight_bytes + size.hidden_bytes))  # fused
    ledger.touch(Item.head, size.block_bytes + size.logits_bytes + size.product_bytes)
    held.append(ledger.allocate(Item.head, size.weight_bytes + size.hidden_bytes))  # eager
    # Logits, twice in backward, beside their softmax.
    ledger.touch(Item.head, 2 * logits)
    wide = weights * WIDE if width < WIDE else 0
    reference = wide + max(3 * logits, (logits + weights * WIDE) if trained else 0)
    # The three gradients are compared in pairs.
    most = max(reference, 2 * size.weight_bytes)
    if job.on_gpu:
        moved = weights * width + 2 * (size.weight_bytes + size.hidden_bytes)
        ledger.touch_if_room(most, on_host=moved + most)
    else:
        ledger.touch(Item.head, most)
    for block in held:
        ledger.release(block)
    graph.shards.release(names, backward=False)
