"""Plan which samples share a pack: once, globally, from (seed, epoch) alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def plan_epoch(
    lengths: Sequence[int], max_length: int, window: int, seed: int, epoch: int
) -> list[list[int]]:
    """Packs of one epoch: every sample exactly once, at most `max_length` tokens a pack.

    Samples are shuffled, then packed inside windows of `window` samples, so that packing reorders
    no further than that; the packs of a window are shuffled too, or its last ones, which hold
    what was left over, would always come last.

    Args:
        lengths: tokens of each sample, each from 1 to `max_length`.
        max_length: tokens of a pack at most.
        window: samples that packing may reorder among themselves.
        seed: of the run.
        epoch: from 0.
    """
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order = random.permutation(len(lengths)).tolist()
    packs: list[list[int]] = []
    for start in range(0, len(order), window):
        packed = best_fit(order[start : start + window], lengths, max_length)
        packs += [packed[i] for i in random.permutation(len(packed))]
    return packs


def best_fit(samples: Sequence[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing (Johnson 1974): the longest sample first, each into the fullest pack
    that still has room for it.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for sample in sorted(samples, key=lambda i: -int(lengths[i])):
        length = int(lengths[sample])
        assert 0 < length <= max_length, f"sample {sample} has {length} tokens"
        at = bisect_left(free, (length, -1))
        if at == len(free):
            left, pack = max_length, len(packs)
            packs.append([])
        else:
            left, pack = free.pop(at)
        packs[pack].append(sample)
        insort(free, (left - length, pack))
    return packs
