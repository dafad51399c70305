"""Samples that begin alike: their beginning stored, and computed, once; or once for each.

    share_beginnings    samples of one row -> trees of samples, each token sequence a path
    repeat_beginnings   a tree -> its paths, each a sample of its own

Both keep the sum over all tokens of weight times loss, and its gradient: a sample that follows
others (`Example.parent`) is computed as if it stood alone behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from posttrain_dist.flow import Example

# What is shared below this is not worth an attention of its own over few tokens.
LEAST_SHARED = 16  # tokens


def share_beginnings(samples: Sequence[Example], capacity: int) -> list[Example]:
    """Samples of one row, such as the turns of a conversation, as trees of at most `capacity`.

    A tree is a unit. One that would be longer is begun again with the next sample, which repeats
    the beginning. A token of several samples has the sum of its weights in them.

    Args:
        samples: without parents and without `extra`, of one channel.
        capacity: tokens of a unit at most; no sample is longer.

    Returns:
        Samples whose `parent` and `unit` count from the first of them.
    """
    found: list[Example] = []
    root: _Node | None = None
    tokens = 0  # of the tree
    for sample in samples:
        assert sample.parent is None and not sample.extra, "a sample of its own"
        shared = sum(length for *_, length in _walk(root, sample.input_ids_L))
        grown = len(sample.input_ids_L) - shared
        if root is None or shared < LEAST_SHARED or tokens + grown > capacity:
            found += _samples_of(root, sample, len(found))
            root, tokens, grown = _Node.behind(sample, 0), 0, len(sample.input_ids_L)
        else:
            _insert(root, sample)
        tokens += grown
    return found + list(_samples_of(root, samples[0], len(found)) if samples else ())


def repeat_beginnings(tree: Sequence[Example]) -> list[Example]:
    """Each path of a unit as a sample of its own: the samples it follows, then itself.

    Weights of samples with children count in their first path. Fields of `extra` are those of the
    last sample of a path; `unit` counts from the first one found.

    Args:
        tree: one unit, whose `parent` counts from its first sample.
    """
    parents = {each.parent for each in tree}
    counted: set[int] = set()
    found: list[Example] = []
    for index, leaf in enumerate(tree):
        if index in parents:
            continue
        path = [index]
        while (parent := tree[path[0]].parent) is not None:
            path.insert(0, parent)
        once = [
            replace(tree[i], weight_L=np.zeros_like(tree[i].weight_L)) if i in counted else tree[i]
            for i in path
        ]
        counted.update(path)
        found.append(replace(joined(once), unit=None if leaf.unit is None else 0))
    return found


def joined(path: Sequence[Example]) -> Example:
    """Samples that follow each other as one without a parent; its `extra` is the last one's."""
    last = path[-1]
    extra = {
        name: np.concatenate([np.asarray(each.extra[name]) for each in path])
        if name.endswith("_L")
        else value
        for name, value in last.extra.items()
    }
    return replace(
        last,
        input_ids_L=np.concatenate([each.input_ids_L for each in path]),
        weight_L=np.concatenate([each.weight_L for each in path]),
        truncated=any(each.truncated for each in path),
        extra=extra,
        parent=None,
    )


def numbered(samples: Sequence[Example], first: int) -> list[Example]:
    """The same samples where `parent` and `unit` count from `first` samples before them on."""
    return [
        replace(
            each,
            parent=None if each.parent is None else each.parent + first,
            unit=None if each.unit is None else each.unit + first,
        )
        for each in samples
    ]


# ------------------------------------------------------------------------------------ the tree


@dataclass(slots=True, eq=False)
class _Node:
    """Tokens that all samples below it share; it has no child, or several."""

    ids_L: npt.NDArray[np.int32]
    weight_L: npt.NDArray[np.float32]
    truncated: bool
    children: list[_Node] = field(default_factory=list)

    @classmethod
    def behind(cls, sample: Example, start: int) -> _Node:
        """A leaf: what stands behind the first tokens of a sample."""
        weight_L = sample.weight_L[start:].copy()
        return cls(sample.input_ids_L[start:], weight_L, sample.truncated)

    def cut(self, length: int) -> None:
        """Keep the first tokens; the others become the only child."""
        rest = _Node(self.ids_L[length:], self.weight_L[length:], self.truncated, self.children)
        self.ids_L, self.weight_L = self.ids_L[:length], self.weight_L[:length]
        self.truncated, self.children = False, [rest]

    def append(self, sample: Example, start: int) -> None:
        """Let a leaf go on with what stands behind the first tokens of a sample."""
        self.ids_L = np.concatenate([self.ids_L, sample.input_ids_L[start:]])
        self.weight_L = np.concatenate([self.weight_L, sample.weight_L[start:]])
        self.truncated = self.truncated or sample.truncated


def _walk(root: _Node | None, ids_L: npt.NDArray[np.int32]) -> Iterator[tuple[_Node, int, int]]:
    """The nodes along which a sample begins: (node, where it begins in it, tokens they share)."""
    node, start = root, 0
    while node is not None:
        length = min(len(node.ids_L), len(ids_L) - start)
        differs = np.flatnonzero(node.ids_L[:length] != ids_L[start : start + length])
        shared = int(differs[0]) if len(differs) else length
        children = node.children if shared == len(node.ids_L) else []
        yield node, start, shared
        start += shared
        goes_on = (
            each for each in children if list(each.ids_L[:1]) == list(ids_L[start : start + 1])
        )
        node = next(goes_on, None)


def _insert(root: _Node, sample: Example) -> None:
    """Put a sample, which shares the first token, into the tree."""
    end = len(sample.input_ids_L)
    for node, start, shared in list(_walk(root, sample.input_ids_L)):
        at = start + shared
        if shared < len(node.ids_L) and at < end:
            node.cut(shared)
        node.weight_L = node.weight_L.copy()
        node.weight_L[:shared] += sample.weight_L[start:at]
    if at == end:
        node.truncated = node.truncated or sample.truncated
    elif node.children:
        node.children.append(_Node.behind(sample, at))
    else:
        node.append(sample, at)


def _samples_of(root: _Node | None, like: Example, first: int) -> Iterator[Example]:
    """A tree as samples, parents first; numbers count from `first` on."""
    waiting: list[tuple[_Node, int | None]] = [] if root is None else [(root, None)]
    number = first
    while waiting:
        node, parent = waiting.pop()
        yield replace(
            like,
            input_ids_L=node.ids_L,
            weight_L=node.weight_L,
            truncated=node.truncated,
            parent=parent,
            unit=first,
        )
        waiting += [(child, number) for child in reversed(node.children)]
        number += 1
