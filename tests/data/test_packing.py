"""Plans hold every sample once, keep the limit and their window, and depend on seed and epoch."""

from __future__ import annotations

import random

import pytest

from posttrain_dist.data.packing import best_fit, plan_epoch

LENGTHS = [random.Random(3).randint(1, 64) for _ in range(500)]


@pytest.mark.parametrize("window", [1, 7, 64, 10_000])
def test_every_sample_once_and_no_pack_above_the_limit(window: int) -> None:
    packs = plan_epoch(LENGTHS, 64, window, seed=1, epoch=0)
    assert sorted(sample for pack in packs for sample in pack) == list(range(500))
    assert max(sum(LENGTHS[sample] for sample in pack) for pack in packs) <= 64
    assert all(packs)


def test_packs_are_nearly_full() -> None:
    packs = plan_epoch(LENGTHS, 64, 10_000, seed=1, epoch=0)
    least = -(-sum(LENGTHS) // 64)  # no plan can have fewer
    assert least <= len(packs) <= 1.03 * least


def test_packing_reorders_inside_its_window_only() -> None:
    alone = plan_epoch(LENGTHS, 64, 1, seed=4, epoch=2)  # window 1: the shuffled order itself
    order = [pack[0] for pack in alone]
    assert order != sorted(order)
    place = {sample: i // 50 for i, sample in enumerate(order)}
    packs = plan_epoch(LENGTHS, 64, 50, seed=4, epoch=2)
    windows = [{place[sample] for sample in pack} for pack in packs]
    assert all(len(window) == 1 for window in windows)
    flat = [min(window) for window in windows]
    assert flat == sorted(flat)


def test_a_plan_is_a_function_of_seed_and_epoch() -> None:
    plans = [plan_epoch(LENGTHS, 64, 50, *key) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(plans[i] != plans[j] for i in range(4) for j in range(i))
    assert plans[2] == plan_epoch(LENGTHS, 64, 50, seed=1, epoch=0)


def test_packs_of_a_window_come_in_random_order() -> None:
    # Best-fit decreasing makes the pack of the longest sample first: it must not stay there.
    longest = LENGTHS.index(max(LENGTHS))
    plans = [plan_epoch(LENGTHS, 64, 500, 0, epoch) for epoch in range(8)]
    places = [next(i for i, pack in enumerate(p) if longest in pack) / len(p) for p in plans]
    assert min(places) < 0.4 < 0.6 < max(places)


def test_best_fit_by_hand() -> None:
    lengths = [5, 6, 4, 3, 2]
    # 6 opens a pack, 5 the next, 4 fills the first, 3 goes beside 5, 2 fills that one.
    assert best_fit(range(5), lengths, 10) == [[1, 2], [0, 3, 4]]
    with pytest.raises(AssertionError, match="sample 0 has 11"):
        best_fit([0], [11], 10)
