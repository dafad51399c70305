"""What virtual tokens make of a row, and what happens to its embeddings.

extended   the job whose rows the model runs on: `tuning/virtual.py` puts tokens before samples
embedded   embeddings of a row, with trained vectors, rows of added tokens, noise
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from posttrain_dist.models.network.tensors import Linear
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.adapters.inserted import added_rows
from posttrain_dist.planner.memory.adapters.placed import embedding_of
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.operations import WIDE, activation, cast, linear, scale
from posttrain_dist.planner.memory.stored import Stored
from posttrain_dist.planner.plan import Item
from posttrain_dist.tuning.prefix_tuning import Prefix
from posttrain_dist.tuning.prompt_tuning import Prompt, PTuning

_ID_BYTES = 8


def extended(job: Job) -> Job:
    """The job with its rows as the model sees them; the supervised tokens are the same, E times."""
    extra, copies = job.tuning.inserted_tokens, job.tuning.copies
    if not extra and copies == 1:
        return job
    size, roots = len(job.row_lengths), job.row_parents
    lengths = [n + extra * (parent < 0) for n, parent in zip(job.row_lengths, roots, strict=True)]
    parents = [p if p < 0 else p + size * copy for copy in range(copies) for p in roots]
    longer = job.with_row(lengths * copies, parents)
    share = job.supervised_share * job.row_tokens * copies / longer.row_tokens
    return replace(longer, supervised_share=share)


def embedded_row(graph: Graph, job: Job, words: Value) -> Value:
    """What stands before the layers.

    Args:
        job: `extended`.
        words: what the table gives for the ids of the row.
    """
    x = words
    if isinstance(job.tuning, Prefix):
        graph.prefix = _prefix(graph, job)
    if isinstance(job.tuning, Prompt | PTuning):
        x = _with_vectors(graph, job, x)
    table = embedding_of(job.network).name.removesuffix(".weight")
    for rows in added_rows(job):
        if rows.trained and rows.name.startswith(f"{table}."):
            x = _with_rows(graph, job, x, rows)
    if job.config.train.neftune_alpha and graph.training:
        x = _noisy(graph, x)
    return x


def _with_vectors(graph: Graph, job: Job, words: Value) -> Value:
    """`prepend`: in float32, then in their places in a copy of the row."""
    graph.item, before = Item.virtual_tokens, graph.item
    vectors = _vectors(graph, job)
    wide = cast(graph, vectors, WIDE)
    virtual = job.row_roots * job.tuning.inserted_tokens
    num_bytes = virtual * (words.size // job.row_tokens) * WIDE
    taken = graph.op((wide,), num_bytes, saves_bytes=_ID_BYTES * virtual, width=WIDE)
    taken = cast(graph, taken, words.width)
    graph.item = before
    return graph.op(
        (words, taken),
        words.num_bytes,
        saves=(taken,),
        saves_bytes=_ID_BYTES * virtual,
        grad_bytes=(words.num_bytes, taken.num_bytes),
    )


def _prefix(graph: Graph, job: Job) -> Value:
    """The table of a prefix, in float32."""
    name, shape = "prefix.weight", job.network.shape
    pairs = shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim
    size = job.tuning.virtual_tokens * pairs * job.value_bytes
    graph.item, before = Item.virtual_tokens, graph.item
    found = cast(graph, graph.op((), size, parameters=((name, size),), gathers=(name,)), WIDE)
    graph.item = before
    return found


def _vectors(graph: Graph, job: Job) -> Value:
    """The table of a prompt, or what the MLP of P-tuning makes."""
    tuning, value = job.tuning, job.value_bytes
    hidden = job.network.shape.hidden_size
    if isinstance(tuning, Prompt):
        size = tuning.ensemble * tuning.tokens * hidden * value
        return graph.op((), size, parameters=(("prompt.weight", size),), gathers=("prompt.weight",))
    assert isinstance(tuning, PTuning)
    name, size = "prompt_encoder.embedding.weight", tuning.tokens * hidden * value
    x = graph.op((), size, parameters=((name, size),), gathers=(name,))
    sizes = [hidden, *[tuning.hidden_size or hidden] * tuning.layers, hidden]
    for i, (width, after) in enumerate(pairwise(sizes)):
        x = activation(graph, x, "relu") if i else x
        layer = Linear(str(2 * i), width, after, "outside", bias=True)
        x = linear(graph, x, layer, f"prompt_encoder.mlp_head.{2 * i}")
    return x


def _with_rows(graph: Graph, job: Job, words: Value, rows: Stored) -> Value:
    """`models/embeddings/added_tokens.py`: rows of the new tokens instead of the table's."""
    looked_up = graph.op(
        (),
        words.num_bytes,
        saves_bytes=_ID_BYTES * job.row_tokens,
        parameters=((rows.name, rows.num_bytes),),
        gathers=(rows.name,),
        item=Item.adapter_activations,
    )
    scaled = scale(graph, looked_up)
    graph.drop(looked_up)
    return graph.op((scaled, words), words.num_bytes, backward_temporary=words.num_bytes)


def _noisy(graph: Graph, x: Value) -> Value:
    """`models/embeddings/neftune.py`: noise in float32, and in the dtype of the row."""
    rounded = x.num_bytes if x.width < WIDE else 0
    noise = graph.tensor(x.size * WIDE + rounded)
    total = graph.join([x])
    graph.drop(noise)
    return total
