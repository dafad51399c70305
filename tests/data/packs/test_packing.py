"""Plans hold every sample once, keep the limit and their window, and depend on seed and epoch."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_dist.data.packs import packing
from posttrain_dist.data.packs.packing import Plan, plan_epoch, plan_in_order

LENGTHS = np.array([random.Random(3).randint(1, 64) for _ in range(500)], np.int32)


def packs_of(plan: Plan) -> list[list[int]]:
    return [plan[i].tolist() for i in range(len(plan))]


def shuffled_order(lengths: np.ndarray, max_length: int, seed: int, epoch: int) -> list[int]:
    """The order before packing: with windows of one sample nothing moves."""
    plan = plan_epoch(lengths, max_length, 1, seed, epoch)
    assert plan.offsets.tolist() == list(range(len(lengths) + 1))
    return plan.order.tolist()


def cut(order: list[int], window: int) -> list[list[int]]:
    """Windows of equal size, at most `window`."""
    num = -(-len(order) // window)
    bounds = [i * len(order) // num for i in range(num + 1)]
    return [order[a:b] for a, b in pairwise(bounds)]


def plain_best_fit(samples: list[int], lengths: np.ndarray, max_length: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every pack for every sample."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for sample in sorted(samples, key=lambda i: -int(lengths[i])):
        length = int(lengths[sample])
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fitting:
            _, at = min(fitting)
        else:
            at = len(packs)
            packs.append([])
            rooms.append(max_length)
        packs[at].append(sample)
        rooms[at] -= length
    return packs


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=120),
    slack=st.integers(0, 60),
    window=st.integers(1, 150),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_each_window_is_packed_as_plain_best_fit_does(
    lengths: list[int], slack: int, window: int, seed: int, epoch: int
) -> None:
    array, max_length = np.array(lengths), max(lengths) + slack
    packs = packs_of(plan_epoch(array, max_length, window, seed, epoch))
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in pack) for pack in packs) <= max_length
    for samples in cut(shuffled_order(array, max_length, seed, epoch), window):
        wanted = plain_best_fit(samples, array, max_length)
        # Windows come in order; only the packs of a window are shuffled.
        own, packs = packs[: len(wanted)], packs[len(wanted) :]
        assert sorted(map(sorted, own)) == sorted(map(sorted, wanted))
    assert packs == []


@pytest.mark.parametrize("max_length", [64, 65, 100, 9000])
def test_long_and_equal_samples_are_packed_as_plain_best_fit_does(max_length: int) -> None:
    lengths = np.repeat([64, 33, 32, 31, 21, 1], [3, 5, 9, 5, 17, 30])
    packs = packs_of(plan_in_order(lengths, max_length, 1000))
    assert packs == plain_best_fit(list(range(len(lengths))), lengths, max_length)


@pytest.mark.parametrize("window", [1, 7, 64, 10_000])
def test_every_sample_once_and_no_pack_above_the_limit(window: int) -> None:
    plan = plan_epoch(LENGTHS, 64, window, seed=1, epoch=0)
    assert sorted(plan.order.tolist()) == list(range(500))
    sums = [sum(int(LENGTHS[i]) for i in pack) for pack in packs_of(plan)]
    assert 0 < min(sums) <= max(sums) <= 64
    assert plan.sums(LENGTHS).tolist() == sums


def test_packs_of_lognormal_lengths_are_full() -> None:
    # The lengths of conversations: exp(N(5.5, 1)), cut at 2048; mean about 375.
    draw = np.random.default_rng(0).normal(5.5, 1, 100_000)
    lengths = np.clip(np.exp(draw).astype(np.int32), 1, 2048)
    plan = plan_epoch(lengths, 2048, 4096, seed=0, epoch=0)
    assert lengths.sum() / (2048 * len(plan)) >= 0.997


def test_windows_are_of_equal_size() -> None:
    # A last window of a few samples could not be packed well: 501 = 167 + 167 + 167.
    lengths = np.append(LENGTHS, 5)
    order = shuffled_order(lengths, 64, 4, 2)
    place = {sample: i // 167 for i, sample in enumerate(order)}
    windows = [{place[i] for i in pack} for pack in packs_of(plan_epoch(lengths, 64, 250, 4, 2))]
    assert all(len(window) == 1 for window in windows)
    assert [min(window) for window in windows] == sorted(min(window) for window in windows)


def test_packing_reorders_inside_its_window_only() -> None:
    order = shuffled_order(LENGTHS, 64, seed=4, epoch=2)
    assert order != sorted(order)
    place = {sample: i // 50 for i, sample in enumerate(order)}
    packs = packs_of(plan_epoch(LENGTHS, 64, 50, seed=4, epoch=2))
    windows = [{place[sample] for sample in pack} for pack in packs]
    assert all(len(window) == 1 for window in windows)
    flat = [min(window) for window in windows]
    assert flat == sorted(flat)


def test_a_plan_is_a_function_of_seed_epoch_and_phase() -> None:
    keys = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1)]
    plans = [packs_of(plan_epoch(LENGTHS, 64, 50, s, e, phase=p)) for s, e, p in keys]
    assert all(plans[i] != plans[j] for i in range(6) for j in range(i))
    assert plans[2] == packs_of(plan_epoch(LENGTHS, 64, 50, seed=1, epoch=0))


def test_packs_of_a_window_come_in_random_order() -> None:
    # Best-fit decreasing makes the pack of the longest sample first: it must not stay there.
    longest = int(LENGTHS.argmax())
    plans = [packs_of(plan_epoch(LENGTHS, 64, 500, 0, epoch)) for epoch in range(8)]
    places = [next(i for i, pack in enumerate(p) if longest in pack) / len(p) for p in plans]
    assert min(places) < 0.4 < 0.6 < max(places)


def test_samples_drawn_twice_stand_twice() -> None:
    drawn = np.array([3, 3, 7, 499, 3], np.int32)
    plan = plan_epoch(LENGTHS, 200, 100, 0, 0, drawn=drawn)
    assert sorted(plan.order.tolist()) == [3, 3, 3, 7, 499]
    assert len(plan_epoch(LENGTHS, 200, 100, 0, 0, drawn=drawn[:0])) == 0


def test_best_fit_by_hand() -> None:
    # 6 opens a pack, 5 the next, 4 fills the first, 3 goes beside 5, 2 fills that one.
    assert packs_of(plan_in_order(np.array([5, 6, 4, 3, 2]), 10, 10)) == [[1, 2], [0, 3, 4]]
    with pytest.raises(AssertionError, match="sample 1 has 11"):
        plan_in_order(np.array([3, 11]), 10, 10)
    with pytest.raises(AssertionError, match="sample 0 has 0"):
        plan_in_order(np.array([0]), 10, 10)


@pytest.mark.parametrize("seed", range(10))
def test_plans_are_the_same_however_many_windows_are_packed_at_once(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(seed)
    num, most, window = (int(random.integers(1, high)) for high in (900, 60, 80))
    lengths = random.integers(1, most + 1, num).astype(np.int32)
    whole = plan_epoch(lengths, most, window, seed, 0), plan_in_order(lengths, most, window)
    monkeypatch.setattr(packing, "_AT_ONCE", int(random.integers(1, 300)))
    parts = plan_epoch(lengths, most, window, seed, 0), plan_in_order(lengths, most, window)
    for one, other in zip(whole, parts, strict=True):
        assert one.order.tolist() == other.order.tolist()
        assert one.offsets.tolist() == other.offsets.tolist()
    assert sorted(whole[0].order.tolist()) == list(range(num))
