"""Ends of a run far beyond what it has: they are found, or refused, without planning up to them."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain_dist.data import MAX_LENGTH, MAX_PASSES, MAX_WINDOW, MixBy
from posttrain_dist.data.packs.mixing import Mixture, SourceSpec
from posttrain_dist.data.packs.order import Order
from posttrain_dist.data.packs.packing import plan_epoch
from posttrain_dist.errors import ConfigError

LENGTHS = np.array([3, 5, 2, 7, 4, 6], np.int32)


def order(mixture: Mixture | None = None) -> Order:
    return Order(LENGTHS, max_length=8, window=4, seed=1, batch_size=2, mixture=mixture)


def mixture_of(schedule: dict[int, float]) -> Mixture:
    sources = np.array([0, 0, 0, 1, 1, 1])
    specs = [SourceSpec(name="a", schedule=schedule), SourceSpec(name="b")]
    return Mixture(sources, LENGTHS, specs, MixBy.rows, 1)


@pytest.mark.parametrize("end", [{"epochs": 3.0}, {"tokens": 60}])
def test_a_weight_of_a_step_that_never_comes_changes_no_end(end):
    plain = order(mixture_of({})).settle(**end)
    assert order(mixture_of({10**15: 0.5})).settle(**end) == plain > 1


def test_more_tokens_than_passes_are_planned_are_refused():
    most = MAX_PASSES * int(LENGTHS.sum())
    with pytest.raises(ConfigError, match=r"more than 10,000 passes over data of 27 tokens") as no:
        order().settle(tokens=most + 1)
    assert no.value.where == "train.tokens"
    with pytest.raises(ConfigError, match=r"train\.tokens: is 1000000000000000: more than"):
        order(mixture_of({})).settle(tokens=10**15)


def test_the_largest_length_and_window_pack_as_any_that_hold_everything():
    first = plan_epoch(LENGTHS, 27, 6, seed=1, epoch=0)
    largest = plan_epoch(LENGTHS, MAX_LENGTH, MAX_WINDOW, seed=1, epoch=0)
    assert len(first) == len(largest) == 1
    assert sorted(largest[0].tolist()) == [0, 1, 2, 3, 4, 5]
