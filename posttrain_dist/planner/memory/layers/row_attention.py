"""Attention over one packed row, as `models/attention.py` and `models/varlen.py` compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.operations import (
    WIDE,
    activation,
    cast,
    dropout,
    multiply,
    scale,
    take_rows,
)
from posttrain_dist.planner.plan import Item

# Rows of more samples than this are planned as so many groups: what it changes is below 1 %.
_MOST_GROUPS = 8
_FLASH_PADDING_TOKENS = 128  # of each sample, in the float32 sum of its backward


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention of one layer, in elements.

    Attributes:
        prefix_tokens: keys that stand before those of each sample (prefix tuning).
        softcap: whether logits are capped.
    """

    num: int  # of queries
    num_kv: int
    width: int  # of queries and keys
    value_width: int
    window: int | None = None
    softcap: bool = False
    prefix_tokens: int = 0


def attend(graph: Graph, job: Job, heads: Heads, q: Value, k: Value, v: Value) -> Value:
    """softmax(q k^T) v of each sample of the row: [T, heads * value_width]."""
    if job.attention in ("varlen", "flash"):
        return _whole_row(graph, job, heads, q, k, v)
    num_tokens = q.size // (heads.num * heads.width)
    lengths = sample_lengths(num_tokens, job.sample_tokens)
    parts = [
        graph.split(x, [x.num_bytes // num_tokens * length for length in lengths])
        for x in (q, k, v)
    ]
    if heads.prefix_tokens:
        for own in parts[1:]:
            own[:] = [_after_prefix(graph, heads, x) for x in own]
    outputs = [
        (_eager if job.attention == "eager" else _sdpa)(graph, job, heads, *sample)
        for sample in zip(*parts, strict=True)
    ]
    return graph.join(outputs)


def sample_lengths(num_tokens: int, longest: int) -> list[int]:
    """A row of samples as long as they may be; of many, so many groups."""
    num = max(1, -(-num_tokens // max(1, longest)))
    if num > _MOST_GROUPS:
        longest = -(-num // _MOST_GROUPS) * longest
    full, rest = divmod(num_tokens, longest)
    return [longest] * full + ([rest] if rest else [])


def _after_prefix(graph: Graph, heads: Heads, x: Value) -> Value:
    """Keys or values of a sample behind those of the prefix, which are cast for each."""
    assert graph.prefix is not None
    size = heads.prefix_tokens * heads.num_kv * heads.width
    kind = Item.virtual_tokens
    before = graph.op((graph.prefix,), size * x.width, grad_bytes=(size * WIDE,), item=kind)
    return graph.join([before, x])


def _whole_row(graph: Graph, job: Job, heads: Heads, q: Value, k: Value, v: Value) -> Value:
    """One flash kernel; each input is row 0 of [1, H, T, d], so that its gradient is filled in."""
    q, k, v = (graph.part(x, x.num_bytes) for x in (q, k, v))
    num_tokens = q.size // (heads.num * heads.width)
    num_samples = -(-num_tokens // max(1, job.sample_tokens))
    if heads.prefix_tokens:
        whole = replace(heads, prefix_tokens=heads.prefix_tokens * num_samples)
        joined = [_after_prefix(graph, whole, x) for x in (k, v)]
        k, v = (take_rows(graph, x, x.num_bytes) for x in joined)  # sample by sample
        del joined
    rows = num_tokens + _FLASH_PADDING_TOKENS * num_samples
    temporary = rows * heads.num * (-(-heads.width // 32) * 32 + 1) * WIDE  # dq, softmax_d
    if heads.num != heads.num_kv:  # dk and dv of each query head
        temporary += 2 * q.num_bytes
    return graph.op(
        (q, k, v),
        num_tokens * heads.num * heads.value_width * q.width,
        saves=(q, k, v),
        saves_output=True,
        saves_bytes=num_tokens * heads.num * WIDE,
        backward_temporary=temporary,
        width=q.width,
    )


def _sdpa(graph: Graph, job: Job, heads: Heads, q: Value, k: Value, v: Value) -> Value:
    """torch's own, sample by sample; on a GPU shared heads are repeated before it."""
    length = q.size // (heads.num * heads.width)
    drops = graph.training and bool(job.network.shape.attention_dropout)
    if job.on_gpu:
        k, v = (_repeated(graph, heads, x) for x in (k, v))
    elif heads.width != heads.value_width or drops:
        return _written_out(graph, heads, q, k, v, drops=drops)
    saves_bytes = length * heads.num * WIDE
    temporary = 0
    masked = heads.window is not None and length > heads.window
    if masked or heads.prefix_tokens:
        length_k = length + heads.prefix_tokens
        saves_bytes += length * length_k * q.width  # booleans become numbers
        temporary = length * length_k
    return graph.op(
        (q, k, v),
        length * heads.num * heads.value_width * q.width,
        saves=(q, k, v),
        saves_output=True,
        saves_bytes=saves_bytes,
        temporary=temporary,
        width=q.width,
    )


def _written_out(graph: Graph, heads: Heads, q: Value, k: Value, v: Value, *, drops: bool) -> Value:
    """What sdpa falls back to on a CPU: to drop weights out, or for values of another width."""
    length = q.size // (heads.num * heads.width)
    k, v = (_repeated(graph, heads, x) for x in (k, v))
    q, k = scale(graph, q), scale(graph, k)
    pairs = heads.num * length * length * q.width
    scores = graph.op((q, k), pairs, saves=(q, k), width=q.width)
    weights = graph.op((scores,), pairs, saves_output=True, width=q.width)
    del scores
    if drops:
        weights = dropout(graph, weights, on_gpu=False)
    size = length * heads.num * heads.value_width * q.width
    return graph.op((weights, v), size, saves=(weights, v), width=q.width)


def _eager(graph: Graph, job: Job, heads: Heads, q: Value, k: Value, v: Value) -> Value:
    """Scores of every pair of tokens, one operation after the other."""
    length = q.size // (heads.num * heads.width)
    k, v = (_repeated(graph, heads, x) for x in (k, v))
    length_k = length + heads.prefix_tokens
    pairs = heads.num * length * length_k
    scores = graph.op((q, k), pairs * q.width, saves=(q, k), width=q.width)
    scores = scale(graph, scores)
    if heads.softcap:
        scores = activation(graph, scale(graph, scores), "tanh")
        scores = scale(graph, scores)
    mask = graph.tensor(length * length_k, width=1)
    scores = graph.op((scores,), scores.num_bytes, saves=(mask,), width=q.width)
    weights = cast(graph, scores, WIDE) if q.width != WIDE else scores
    weights = graph.op((scores,), pairs * WIDE, saves_output=True, width=WIDE)
    weights = cast(graph, weights, q.width)
    return graph.op(
        (weights, v),
        length * heads.num * heads.value_width * q.width,
        saves=(weights, v),
        width=q.width,
    )


def _repeated(graph: Graph, heads: Heads, x: Value) -> Value:
    """A key or value head for each query head."""
    groups = heads.num // heads.num_kv
    return x if groups == 1 else graph.op((x,), x.num_bytes * groups, width=x.width)


def rotate(
    graph: Graph,
    x: Value,
    *,
    share: float = 1.0,
    wide: bool = False,
    angles: Sequence[Value] = (),
) -> Value:
    """Rotary positions: x * cos + rotate_half(x) * sin.

    Args:
        share: of each head that is turned.
        wide: in float32.
        angles: cosines and sines that nobody else keeps.
    """
    if share == 0:
        return x
    if share < 1:
        turned = round(x.num_bytes * share)
        first, rest = graph.part(x, turned), graph.part(x, x.num_bytes - turned)
        return graph.join([rotate(graph, first, wide=wide, angles=angles), rest])
    width = x.width
    if wide:
        x = cast(graph, x, WIDE)
    cosines, sines = angles[:1], angles[1:]
    straight = graph.op((x,), x.num_bytes, saves=cosines, width=x.width)
    half = x.num_bytes // 2
    first, second = graph.part(x, half), graph.part(x, half)
    turned_half = scale(graph, second)  # its sign
    joined = graph.join([turned_half, first])
    del turned_half
    across = graph.op((joined,), joined.num_bytes, saves=sines, width=x.width)
    del joined
    return cast(graph, graph.add(straight, across), width)


def gated(graph: Graph, gate: Value, up: Value, kind: str) -> Value:
    """act(gate) * up."""
    return multiply(graph, activation(graph, gate, kind), up)
