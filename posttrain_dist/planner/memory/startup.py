"""What the start-up check of the head allocates: `models/parity.py` on the first batch."""

from __future__ import annotations

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.autograd import Graph
from posttrain_dist.planner.memory.layers.ends import HeadSize, num_targets
from posttrain_dist.planner.memory.operations import WIDE
from posttrain_dist.planner.plan import Item

MAX_ROWS = 256  # models/parity.py


def check_parity(graph: Graph, job: Job, name: str, *, fast: bool) -> None:
    """Fused, eager and reference loss of some rows, each with the gradient of the whole weight.

    On a GPU without room for the reference, it runs in host memory, as the check itself does.

    Args:
        name: of the head's weight.
    """
    ledger, shape, width = graph.ledger, job.network.shape, graph.width
    rows = min(num_targets(job), MAX_ROWS)
    weights = shape.vocab_size * shape.hidden_size
    logits = rows * shape.vocab_size * WIDE
    graph.shards.gather((name,), backward=False)
    size = HeadSize(job, width, rows, trained=True, fast=fast)
    taken = ledger.allocate(Item.head, size.hidden_bytes)  # the rows
    fused = ledger.allocate(Item.head, size.weight_bytes + size.hidden_bytes)
    ledger.touch(Item.head, size.block_bytes + size.logits_bytes + size.product_bytes)
    eager = ledger.allocate(Item.head, size.weight_bytes + size.hidden_bytes)
    # Logits, twice in backward, beside their softmax.
    ledger.touch(Item.head, 2 * logits)
    wide = weights * WIDE if width < WIDE else 0
    reference = wide + max(3 * logits, logits + weights * WIDE)
    # The three gradients are compared in pairs.
    compared = 2 * size.weight_bytes
    room = job.machine.gpu_memory_bytes - ledger.total_bytes
    if not job.on_gpu or max(reference, compared) <= room:
        ledger.touch(Item.head, max(reference, compared))
    ledger.release(taken)
    ledger.release(fused)
    ledger.release(eager)
    graph.shards.release((name,), backward=False)
