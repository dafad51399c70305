"""Attention over one packed row, as `models/attention.py` and `models/varlen.py` compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.ledger import Block
from posttrain_dist.planner.memory.operations import (
    WIDE,
    activation,
    cast,
    dropout,
    multiply,
    scale,
)
from posttrain_dist.planner.plan import Item

# Samples whose pairs of tokens together are fewer than this part of a row's, or than those of its
# longest sample, are planned as one.
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


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples of a row that are planned as one: attention stays inside of each.

    Attributes:
        lengths: tokens of each.
        prefix_tokens: keys that stand before those of each.
        before: tokens that each follows; empty: none.
    """

    lengths: tuple[int, ...]
    prefix_tokens: int = 0
    before: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Of all samples."""
        return sum(self.lengths)

    @property
    def num_keys(self) -> int:
        """That all samples attend to, each by itself."""
        return sum(keys for _, keys in self._sizes())

    @property
    def num_pairs(self) -> int:
        """Of a token and a key of its sample, later ones included."""
        return sum(length * keys for length, keys in self._sizes())

    def masked_pairs(self, window: int | None) -> int:
        """Of the samples that a mask is made for."""
        return sum(
            length * keys
            for length, keys in self._sizes()
            if keys > length or (window is not None and length > window)
        )

    def _sizes(self) -> list[tuple[int, int]]:
        """Tokens and keys of each."""
        before = self.before or (0,) * len(self.lengths)
        return [
            (length, length + own + self.prefix_tokens)
            for length, own in zip(self.lengths, before, strict=True)
        ]


def attend(graph: Graph, job: Job, heads: Heads, q: Value, k: Value, v: Value) -> Value:
    """softmax(q k^T) v of each sample of the row: [T, heads * value_width]."""
    if job.attention in ("varlen", "flash"):
        return _whole_row(graph, job, heads, q, k, v)
    run = _eager if job.attention == "eager" else _sdpa
    if any(job.row_before):
        return _attend_units(graph, job, heads, (q, k, v), run)
    groups = [Samples(each, heads.prefix_tokens) for each in groups_of(job.row_lengths)]
    parts = [
        graph.split(x, [x.num_bytes // job.row_tokens * each.num_tokens for each in groups])
        for x in (q, k, v)
    ]
    if heads.prefix_tokens:
        for own in parts[1:]:
            own[:] = [
                _after_prefix(graph, heads, x, len(each.lengths))
                for x, each in zip(own, groups, strict=True)
            ]
    outputs = [run(graph, job, heads, *each) for each in zip(groups, *parts, strict=True)]
    return graph.join(outputs)


def groups_of(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """The samples of a row, in few groups: none has more pairs than it may."""
    pairs = [length**2 for length in lengths]
    most = max(max(pairs), sum(pairs) // _MOST_GROUPS)
    groups: list[tuple[int, ...]] = []
    room = 0
    for length, own in zip(lengths, pairs, strict=True):
        if own > room:
            groups.append(())
            room = most
        groups[-1] += (length,)
        room -= own
    return groups


def _after_prefix(graph: Graph, heads: Heads, x: Value, num_samples: int) -> Value:
    """Keys or values of samples behind those of the prefix, which are cast for each."""
    assert graph.prefix is not None
    size = num_samples * heads.prefix_tokens * heads.num_kv * heads.width
    kind = Item.virtual_tokens
    before = graph.op((graph.prefix,), size * x.width, grad_bytes=(size * WIDE,), item=kind)
    return graph.join([before, x])


def _attend_units(
    graph: Graph,
    job: Job,
    heads: Heads,
    row: tuple[Value, Value, Value],
    run: Callable[..., Value],
) -> Value:
    """Sample by sample where some follow others: keys and values of a sample stand behind those of
    its parent. Samples at one place of several units are planned as one.
    """
    slots = slots_of(job.row_lengths, job.row_parents, job.row_before, heads.prefix_tokens)
    sizes = [slot.samples.num_tokens for slot in slots]
    queries, keys, values = (
        graph.split(x, [x.num_bytes // job.row_tokens * size for size in sizes]) for x in row
    )
    outputs = []
    for i, slot in enumerate(slots):
        for each, width in ((keys, heads.width), (values, heads.value_width)):
            if slot.parent is not None:
                num_bytes = slot.samples.num_keys * heads.num_kv * width * each[i].width
                each[i] = _behind(graph, each[slot.parent], each[i], num_bytes)
            elif heads.prefix_tokens:
                each[i] = _after_prefix(graph, heads, each[i], len(slot.samples.lengths))
        outputs.append(run(graph, job, heads, slot.samples, queries[i], keys[i], values[i]))
    return graph.join(outputs)


def _behind(graph: Graph, before: Value, own: Value, num_bytes: int) -> Value:
    """torch.cat of a parent's and of own tokens, whose gradients are views of the whole.

    Those that a parent gets from several samples are added up in a tensor of its own.
    """
    above, edge, parent_bytes = before.edge, own.edge, before.num_bytes
    if above is None and edge is None:
        return graph.op((), num_bytes, width=own.width)

    def back(gradient: Block) -> None:
        ledger = graph.ledger
        graph.give(edge, ledger.hold(gradient))
        if above is None:
            return
        if above.gradient is None:
            graph.give(above, ledger.hold(gradient))
            return
        total = ledger.allocate(gradient.item, parent_bytes)
        ledger.release(above.gradient)
        above.gradient = total

    return graph.custom((before, own), num_bytes, back, width=own.width)


def _gathered(graph: Graph, x: Value, num_bytes: int) -> Value:
    """Rows by index; the gradients of one that is taken several times add up in float32."""
    wide = WIDE // x.width * (num_bytes + x.num_bytes) if x.width < WIDE else 0
    return graph.op((x,), num_bytes, backward_temporary=wide, width=x.width)


class Slot(NamedTuple):
    """Samples that stand at one place of several units; `parent`: the slot that they follow."""

    samples: Samples
    parent: int | None


def slots_of(
    lengths: Sequence[int], parents: Sequence[int], before: Sequence[int], prefix_tokens: int = 0
) -> list[Slot]:
    """The samples of a row by their places in its trees, for some trees at once."""
    starts = [i for i, parent in enumerate(parents) if parent < 0]
    trees = [range(i, end) for i, end in zip(starts, (*starts[1:], len(parents)), strict=True)]
    sizes = [math.isqrt(sum(lengths[i] * (lengths[i] + before[i]) for i in tree)) for tree in trees]
    found: list[Slot] = []
    done = 0
    for group in groups_of(sizes):
        members = trees[done : done + len(group)]
        done += len(group)
        first = len(found)
        for place in range(max(map(len, members))):
            own = [tree[place] for tree in members if len(tree) > place]
            above = parents[own[0]] - (own[0] - place)  # place of the parent in its tree
            samples = Samples(
                tuple(lengths[i] for i in own), prefix_tokens, tuple(before[i] for i in own)
            )
            found.append(Slot(samples, None if parents[own[0]] < 0 else first + above))
    return found


def _whole_row(graph: Graph, job: Job, heads: Heads, q: Value, k: Value, v: Value) -> Value:
    """One flash kernel; each input is row 0 of [1, H, T, d], so that its gradient is filled in."""
    q, k, v = (graph.part(x, x.num_bytes) for x in (q, k, v))
    num_tokens = q.size // (heads.num * heads.width)
    num_samples = len(job.row_lengths)
    if heads.prefix_tokens or any(job.row_before):  # keys and values stand once for each sample
        keys = Samples(job.row_lengths, heads.prefix_tokens, job.row_before).num_keys
        if heads.prefix_tokens:
            k, v = (_after_prefix(graph, heads, x, job.row_roots) for x in (k, v))
        k, v = (
            _gathered(graph, x, keys * heads.num_kv * width * x.width)
            for x, width in ((k, heads.width), (v, heads.value_width))
        )
    rows = num_tokens + _FLASH_PADDING_TOKENS * num_samples
    temporary = rows * heads.num * (-(-heads.width // 32) * 32 + 1) * WIDE  # dq, softmax_d
    if heads.num != heads.num_kv:  # dk and dv of each query head
        temporary += (k.num_bytes + v.num_bytes) * heads.num // heads.num_kv
    return graph.op(
        (q, k, v),
        num_tokens * heads.num * heads.value_width * q.width,
        saves=(q, k, v),
        saves_output=True,
        saves_bytes=num_tokens * heads.num * WIDE,
        backward_temporary=temporary,
        width=q.width,
    )


def _sdpa(
    graph: Graph, job: Job, heads: Heads, samples: Samples, q: Value, k: Value, v: Value
) -> Value:
    """torch's own, sample by sample; on a GPU shared heads are repeated before it."""
    num_tokens = samples.num_tokens
    drops = graph.drops and bool(job.network.shape.attention_dropout)
    if job.on_gpu:
        k, v = (_repeated(graph, heads, x) for x in (k, v))
    elif heads.width != heads.value_width or drops:
        return _written_out(graph, heads, samples, q, k, v, drops=drops)
    masked = samples.masked_pairs(heads.window)
    return graph.op(
        (q, k, v),
        num_tokens * heads.num * heads.value_width * q.width,
        saves=(q, k, v),
        saves_output=True,
        saves_bytes=num_tokens * heads.num * WIDE + masked * q.width,  # booleans become numbers
        temporary=masked,
        width=q.width,
    )


def _written_out(
    graph: Graph, heads: Heads, samples: Samples, q: Value, k: Value, v: Value, *, drops: bool
) -> Value:
    """What sdpa falls back to on a CPU: to drop weights out, or for values of another width."""
    k, v = (_repeated(graph, heads, x) for x in (k, v))
    q, k = scale(graph, q), scale(graph, k)
    pairs = heads.num * samples.num_pairs * q.width
    scores = graph.op((q, k), pairs, saves=(q, k), width=q.width)
    weights = graph.op((scores,), pairs, saves_output=True, width=q.width)
    del scores
    if drops:
        weights = dropout(graph, weights, on_gpu=False)
    size = samples.num_tokens * heads.num * heads.value_width * q.width
    return graph.op((weights, v), size, saves=(weights, v), width=q.width)


def _eager(
    graph: Graph, job: Job, heads: Heads, samples: Samples, q: Value, k: Value, v: Value
) -> Value:
    """Scores of every pair of tokens, one operation after the other."""
    k, v = (_repeated(graph, heads, x) for x in (k, v))
    pairs = heads.num * samples.num_pairs
    scores = graph.op((q, k), pairs * q.width, saves=(q, k), width=q.width)
    scores = scale(graph, scores)
    if heads.softcap:
        scores = activation(graph, scale(graph, scores), "tanh")
        scores = scale(graph, scores)
    mask = graph.tensor(samples.num_pairs, width=1)
    scores = graph.op((scores,), scores.num_bytes, saves=(mask,), width=q.width)
    weights = cast(graph, scores, WIDE) if q.width != WIDE else scores
    weights = graph.op((scores,), pairs * WIDE, saves_output=True, width=WIDE)
    weights = cast(graph, weights, q.width)
    return graph.op(
        (weights, v),
        samples.num_tokens * heads.num * heads.value_width * q.width,
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
