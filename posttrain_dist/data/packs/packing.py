"""Plan which samples share a pack: once, globally, from (seed, epoch) alone.

    shuffle -> cut into windows -> best-fit decreasing in each window -> shuffle its packs

A window's lengths are a histogram, so that samples of one length are placed together: a million
samples in windows of 4096 take about half a million placements.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from operator import neg

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.signedinteger]

_AT_ONCE = 1 << 17  # samples that are packed at once


@dataclass(frozen=True, slots=True)
class Plan:
    """Packs laid end to end: pack p holds the samples order[offsets[p] : offsets[p + 1]]."""

    order: Ints  # [samples drawn]
    offsets: Ints  # [packs + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> Ints:
        """Samples of one pack."""
        return self.order[self.offsets[pack] : self.offsets[pack + 1]]

    def sums(self, values: Ints) -> Ints:
        """The sum of `values` (one per sample) over each pack."""
        total = np.concatenate([[0], np.cumsum(values[self.order], dtype=np.int64)])
        sums: Ints = np.diff(total[self.offsets])
        return sums


def plan_epoch(
    lengths: Ints,
    max_length: int,
    window: int,
    seed: int,
    epoch: int,
    *,
    phase: int = 0,
    drawn: Ints | None = None,
) -> Plan:
    """Packs of one epoch: every drawn sample once, at most `max_length` tokens a pack.

    Samples are shuffled and cut into windows of equal size, at most `window`; packing moves a
    sample inside its window only. The packs of a window are shuffled too, or its last ones, which
    hold what was left over, would always come last.

    Args:
        lengths: tokens of each sample, each from 1 to `max_length`.
        max_length: tokens of a pack at most.
        window: samples that packing may reorder among themselves.
        seed: of the run.
        epoch: from 0.
        phase: of the mixture, from 0.
        drawn: samples of the epoch, some perhaps several times; None: each once.
    """
    key = np.random.SeedSequence([seed, epoch, phase])
    random = np.random.Generator(np.random.Philox(key))
    if drawn is None:
        drawn = np.arange(len(lengths), dtype=np.int32)
    return _pack(random.permutation(drawn), lengths, max_length, window, random)


def plan_in_order(lengths: Ints, max_length: int, window: int) -> Plan:
    """Packs of all samples in the order that they have, for evaluation: nothing is shuffled."""
    return _pack(np.arange(len(lengths), dtype=np.int32), lengths, max_length, window, None)


def _pack(
    order: Ints, lengths: Ints, max_length: int, window: int, random: np.random.Generator | None
) -> Plan:
    """Pack the windows of `order`; with `random`, in a random order inside each window.

    Some windows at a time: what is known of a sample meanwhile takes a hundred bytes.
    """
    num = len(order)
    if not num:
        return Plan(order, np.zeros(1, np.int64))
    num_windows = -(-num // window)
    starts = np.arange(num_windows + 1) * num // num_windows
    most = max(1, _AT_ONCE // window)
    packed, sizes = np.empty_like(order), [np.zeros(1, np.int64)]
    for begin in range(0, num_windows, most):
        bounds = starts[begin : begin + most + 1]
        here = slice(bounds[0], bounds[-1])
        length = np.asarray(lengths)[order[here]].astype(np.int64)
        wrong = np.flatnonzero((length < 1) | (length > max_length))
        assert not len(wrong), f"sample {order[here][wrong[0]]} has {length[wrong[0]]} tokens"
        by_pack, sizes_here = _pack_windows(
            begin, bounds - bounds[0], length, max_length, window, random
        )
        packed[here] = order[here][by_pack]
        sizes.append(sizes_here)
    return Plan(packed, np.cumsum(np.concatenate(sizes)))


def _pack_windows(
    first_window: int,
    starts: Ints,
    length: Ints,
    max_length: int,
    window: int,
    random: np.random.Generator | None,
) -> tuple[Ints, Ints]:
    """Pack windows that follow each other.

    Args:
        first_window: number of the first one.
        starts: places where the windows begin, and where the last one ends.
        length: of each sample.

    Returns:
        Places of the samples, pack after pack, and the number of samples of each pack.
    """
    num, num_windows = len(length), len(starts) - 1
    window_of = np.repeat(np.arange(num_windows), np.diff(starts))

    # One number a sample: (window, longest first, place in the shuffled order), to sort at once.
    group = window_of * (max_length + 1) + (max_length - length)
    bits = num.bit_length()
    group_at = np.sort(group << bits | np.arange(num))
    sorted_order = group_at & ((1 << bits) - 1)
    group = group_at >> bits
    heads = np.flatnonzero(np.diff(group, prepend=-1))  # first sample of each length of a window
    counts = np.diff(heads, append=num)
    keys = (max_length - group[heads] % (max_length + 1)) * window
    bounds = np.searchsorted(heads, starts)  # groups of each window

    places: list[int] = []  # of each placement: its pack, numbered inside its window
    numbers: list[int] = []  # ... and how many samples it took
    ends, packs = [], []  # of each window: placements so far, packs
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        of_window = keys[begin:end].tolist(), counts[begin:end].tolist()
        packs.append(best_fit(*of_window, max_length * window, places, numbers))
        ends.append(len(places))
    first = np.concatenate([[0], np.cumsum(packs)])
    placed = np.array(places, np.int64) % window
    placed += np.repeat(first[:-1], np.diff(ends, prepend=0))
    pack_of = np.repeat(placed, numbers)  # of each sample in sorted_order
    if random is not None:
        numbers_W = first_window + np.arange(num_windows)
        chance = random.random(first[-1]) + np.repeat(numbers_W, packs)
        rank = np.empty(first[-1], np.int64)
        rank[np.argsort(chance)] = np.arange(first[-1])
        pack_of = rank[pack_of]
    by_pack = np.sort(pack_of << bits | np.arange(num)) & ((1 << bits) - 1)
    return sorted_order[by_pack], np.bincount(pack_of)


def best_fit(
    keys: list[int], counts: list[int], capacity: int, places: list[int], numbers: list[int]
) -> int:
    """Best-fit decreasing (Johnson 1974) of one window: the longest sample first, each into the
    fullest pack that still has room for it, the oldest of equal ones; returns how many packs.

    Lengths are given as multiples of a unit above the number of samples, so that `room * unit +
    pack` is one small integer, which sorts by room, then by age. After a sample went into the
    fullest pack with room, that pack is the fullest with room for the next sample of its length.

    Args:
        keys: the different lengths, descending, times the unit.
        counts: samples of each.
        capacity: of a pack, times the unit.
        places: gets, for each placement, a number whose remainder by the unit is the pack.
        numbers: gets how many samples each placement put there.
    """
    least = keys[-1]  # packs with less room than this are full
    # Samples above half of a pack open one each; the shorter, the more room they leave.
    num_long = bisect_left(keys, -(capacity // 2), key=neg)
    long = [key for key, count in zip(keys[:num_long], counts, strict=False) for _ in range(count)]
    num_packs = len(long)
    places.extend(range(capacity, capacity + num_packs))
    numbers.extend([1] * num_packs)
    rooms = [capacity + pack - key for pack, key in enumerate(long)]
    free = rooms[bisect_left(rooms, least) :]  # packs with room, sorted
    place, number, take = places.append, numbers.append, free.pop  # looked up once: a hot loop
    for key, count in zip(keys[num_long:], counts[num_long:], strict=True):
        while count:
            at = bisect_left(free, key)
            if at < len(free):
                room = take(at)
            else:
                room = capacity + num_packs
                num_packs += 1
            fit = 1 if count == 1 else room // key
            if fit > count:
                fit = count
            count -= fit
            place(room)
            number(fit)
            room -= fit * key
            if room >= least:
                insort(free, room)
    return num_packs
