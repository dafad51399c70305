"""What stands before the layers and behind them: embedding, final norm, head and loss."""

from __future__ import annotations

import math

from posttrain_dist.models.network.tensors import Tensor
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.adapters.head_weight import HeadWeight, head_weight
from posttrain_dist.planner.memory.autograd import Edge, Graph, Value
from posttrain_dist.planner.memory.ledger import Block
from posttrain_dist.planner.memory.operations import WIDE, linear, rms_norm, scale
from posttrain_dist.planner.plan import Item

# As in posttrain_kernels: passes/chunked.py, passes/matmuls.py and passes/torch_kernels.py.
CHUNK_BYTES_GPU_TRAINED, CHUNK_BYTES_GPU_FROZEN, CHUNK_BYTES_CPU = 1 << 30, 1 << 28, 1 << 26
BLOCK_ELEMENTS, STRIP_ELEMENTS_CPU = 1 << 21, 1 << 18
TARGET_MULTIPLE = 128  # data/packs/collate.py
_INDEX_BYTES = 8


def num_targets(job: Job) -> int:
    """Supervised tokens of the row, padded as `collate` pads them; a sample's first is none."""
    most = job.row_tokens - len(job.row_lengths)
    found = min(math.ceil(job.row_tokens * job.supervised_share), most)
    return max(1, -(-found // TARGET_MULTIPLE)) * TARGET_MULTIPLE


def batch_bytes(job: Job) -> int:
    """Of one `Batch`: ids and positions, and of targets place, label, channel and weight."""
    return 2 * _INDEX_BYTES * job.row_tokens + (3 * _INDEX_BYTES + WIDE) * num_targets(job)


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


class HeadSize:
    """Chunks and buffers of the fused head, in bytes.

    Args:
        trained: whether a gradient of the weight is made.
        fast: whether the device multiplies in this dtype (else float32 blocks of the weight).
        more_columns: of hidden states and weight, by an adapter.
    """

    def __init__(
        self,
        job: Job,
        width: int,
        num_rows: int,
        *,
        trained: bool,
        fast: bool,
        more_columns: int = 0,
    ) -> None:
        shape = job.network.shape
        vocabulary, hidden = shape.vocab_size, shape.hidden_size + more_columns
        budget, row = CHUNK_BYTES_CPU, vocabulary * WIDE
        if job.on_gpu:
            budget = CHUNK_BYTES_GPU_TRAINED if trained else CHUNK_BYTES_GPU_FROZEN
            row = vocabulary * width
        most = max(128, budget // max(row, 1) // 128 * 128)
        self.num_chunks = -(-num_rows // most)
        rows = -(-num_rows // max(self.num_chunks, 1))
        stride = -(-vocabulary // 16) * 16 if job.on_gpu else vocabulary
        logit = width if fast else WIDE
        self.logits_bytes = rows * stride * logit
        self.hidden_bytes = num_rows * hidden * width
        self.weight_bytes = vocabulary * hidden * width if trained else 0
        self.sum_bytes = 0  # of the weight's gradient while chunks are added up
        if trained and self.num_chunks > 1 and width < WIDE:
            self.sum_bytes = vocabulary * hidden * WIDE
        # Beside them: strips in float32 of a 16-bit chunk; blocks and copies in float32.
        self.block_bytes = self.product_bytes = 0
        if not fast:
            self.block_bytes = min(max(1, BLOCK_ELEMENTS // hidden), vocabulary) * hidden * WIDE
            self.product_bytes = rows * hidden * WIDE
        elif width < WIDE and not job.on_gpu:
            strip = max(1, STRIP_ELEMENTS_CPU // vocabulary) * vocabulary * WIDE
            part = vocabulary * hidden * width if trained and self.num_chunks > 1 else 0
            self.product_bytes = max(strip, part)
        if shape.softcap and not job.on_gpu:  # its slope and square, strip by strip
            strip = max(1, STRIP_ELEMENTS_CPU // vocabulary)
            self.product_bytes += 2 * min(strip, rows) * vocabulary * WIDE
        self.statistics_bytes = num_rows * (2 * WIDE + 1)


def head_loss(
    graph: Graph, job: Job, hidden: Value, name: str, num_rows: int, *, fast: bool
) -> Value:
    """The loss of the fused head, which makes its gradients in the forward.

    Args:
        name: of the weight, that of the embedding where it is tied.
    """
    ledger, item = graph.ledger, Item.head
    made = head_weight(job, name)
    names: tuple[str, ...] = (name,)
    columns = 0
    if made is not None:
        names, columns = made.names, made.columns
    trained = graph.recording and (name in graph.trained or made is not None)
    size = HeadSize(job, graph.width, num_rows, trained=trained, fast=fast, more_columns=columns)
    graph.shards.gather(names, backward=False)
    joined = made_weight(graph, job, num_rows, made)
    statistics = ledger.allocate(item, size.statistics_bytes)
    working = [ledger.allocate(item, n) for n in (size.block_bytes, size.logits_bytes) if n]
    needs_grad = graph.recording and hidden.needs_grad
    grad_hidden = ledger.allocate(item, size.hidden_bytes) if needs_grad else None
    grad_weight: Block | None = None
    if trained:
        grad_weight = ledger.allocate(item, size.sum_bytes or size.weight_bytes)
    ledger.touch(item, size.product_bytes)
    if grad_weight is not None and size.sum_bytes:
        rounded = ledger.allocate(item, size.weight_bytes)
        ledger.release(grad_weight)
        grad_weight = rounded
    for block in working + joined:
        ledger.release(block)
    graph.shards.release(names, backward=False)
    edge: Edge | None = hidden.edge
    graph.item = Item.activations

    def back(_: Block) -> None:
        if grad_weight is not None and made is not None:
            parts = [(each, ledger.allocate(Item.gradients, n)) for each, n in made.trained]
            ledger.release(grad_weight)
            for each, block in parts:
                graph.shards.gradient(each, block)
        elif grad_weight is not None and job.network.shape.tied:
            graph.waiting[name] = grad_weight
        elif grad_weight is not None:
            graph.shards.gradient(name, grad_weight)
        if grad_hidden is not None:
            graph.give(edge, grad_hidden)

    loss = graph.custom((hidden,), WIDE, back, width=WIDE)
    ledger.release(statistics)
    return loss


def made_weight(graph: Graph, job: Job, num_rows: int, made: HeadWeight | None) -> list[Block]:
    """Allocate a weight that an adapter makes for the head, and hidden states with more columns."""
    if made is None:
        return []
    shape = job.network.shape
    width = shape.hidden_size + made.columns
    num_bytes = shape.vocab_size * width * graph.width
    graph.ledger.touch(Item.head, made.copies * num_bytes)
    found = [graph.ledger.allocate(Item.head, num_bytes)]
    if made.columns:
        found.append(graph.ledger.allocate(Item.head, num_rows * width * graph.width))
    return found
