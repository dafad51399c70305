"""Ranks get equal counts and nearly equal work, and costs are those of the formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_dist.data.packs.balance import Cost, assign_packs
from posttrain_dist.data.packs.packing import plan_epoch


def test_cost_by_hand() -> None:
    cost = Cost(token=2.0, pair=0.5, target=10.0)
    # 2·l + l²/2 + 10·s
    assert cost.of(np.array([4, 10]), np.array([1, 0])).tolist() == [26.0, 70.0]


def test_cost_of_a_model_is_its_operations() -> None:
    d, layers, vocabulary, length, targets = 512, 6, 32_000, 1000, 300
    matrices = length * layers * (4 * 2 * d * d + 2 * 2 * d * 4 * d)  # attention's 4, the MLP's 2
    pairs = layers * 2 * 2 * d * length * length / 2  # q·k and p·v, half of them causal
    head = targets * 2 * d * vocabulary
    own = Cost.of_model(d, layers, vocabulary)
    ratio = (
        own.of(np.array([length]), np.array([targets]))[0] / own.of(np.array([1]), np.array([0]))[0]
    )
    one = layers * (24 * d * d + 2 * d)
    assert ratio == pytest.approx((matrices + pairs + head) / one, rel=1e-9)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_every_pack_once_and_counts_are_equal(costs: list[int], world: int) -> None:
    shares = assign_packs(np.array(costs, float), world)
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    totals = [sum(costs[pack] for pack in share) for share in shares]
    # No two ranks are apart by more than one pack.
    assert max(totals) - min(totals) <= max(costs, default=0)


def test_two_packs_a_rank_are_dealt_best() -> None:
    costs = np.array([9.0, 1.0, 5.0, 6.0, 2.0, 8.0])
    totals = sorted(sum(costs[share]) for share in assign_packs(costs, 3))
    best = min(
        max(costs[list(p[0:2])].sum(), costs[list(p[2:4])].sum(), costs[list(p[4:6])].sum())
        for p in itertools.permutations(range(6))
    )
    assert totals[-1] == best == 11.0


@pytest.mark.parametrize(("max_length", "mean"), [(2048, 5.5), (8192, 6.5), (32_768, 7.5)])
def test_eight_ranks_have_the_same_work(max_length: int, mean: float) -> None:
    random = np.random.default_rng(2)
    lengths = np.clip(np.exp(random.normal(mean, 1, 40_000)).astype(np.int64), 2, max_length)
    supervised = (lengths * random.uniform(0.05, 0.95, len(lengths))).astype(np.int64)
    plan = plan_epoch(lengths, max_length, 4096, seed=0, epoch=0)
    costs_of_samples = Cost().of(lengths, supervised)
    costs = np.array([costs_of_samples[plan[i]].sum() for i in range(len(plan))])
    in_turn, dealt = [], []
    for start in range(0, len(plan) - 63, 64):  # 8 packs a rank
        step = costs[start : start + 64]
        totals = np.array([step[share].sum() for share in assign_packs(step, 8)])
        dealt.append(totals.max() / totals.mean())
        totals = step.reshape(8, 8).sum(axis=0)
        in_turn.append(totals.max() / totals.mean())
    assert max(dealt) <= 1.02
    assert np.mean(dealt) <= 1.005
    assert np.mean(dealt) - 1 < (np.mean(in_turn) - 1) / 4


def test_packs_run_at_the_same_time_cost_the_same() -> None:
    # Under sharding every turn takes as long as its most expensive pack.
    costs = np.random.default_rng(0).uniform(1, 2, 64)
    turns = np.array([costs[share] for share in assign_packs(costs, 8)]).T
    least = np.sort(costs)[::-1][::8].sum()  # each next 8 packs together
    assert turns.max(axis=1).sum() <= 1.03 * least
    assert costs.reshape(8, 8).max(axis=1).sum() > 1.2 * least
