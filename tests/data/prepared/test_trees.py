"""Samples that begin alike as trees: every target keeps what stands before it, and its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from targets import targets

from posttrain_dist.data.prepared.trees import LEAST_SHARED, repeat_beginnings, share_beginnings
from posttrain_dist.flow import Example

CAPACITY = 160


def sample(ids: Sequence[int], weights: dict[int, float], truncated: bool = False) -> Example:
    weight_L = np.zeros(len(ids), np.float32)
    for place, weight in weights.items():
        weight_L[place] = weight
    return Example(np.array(ids, np.int32), weight_L, 3, -1, truncated)


def conversation(seed: int) -> list[Example]:
    """Turns behind what stands before them, with some of it cut out, as thoughts are."""
    draw = np.random.default_rng(seed)
    history = draw.integers(0, 9, 20).tolist()
    made = []
    for _ in range(6):
        said = draw.integers(0, 9, int(draw.integers(1, 12))).tolist()
        weights = {len(history) + i: float(draw.choice([0.5, 1.0])) for i in range(len(said))}
        made.append(sample([*history, *said], weights, truncated=bool(draw.random() < 0.2)))
        history += said[int(draw.integers(0, len(said) + 1)) :]
        history += draw.integers(0, 9, int(draw.integers(0, 8))).tolist()
    return made


@pytest.mark.parametrize("seed", range(20))
def test_targets_stay_what_they_are_and_units_fit(seed: int) -> None:
    turns = conversation(seed)
    kept = [turn.weight_L.copy() for turn in turns]
    trees = share_beginnings(turns, CAPACITY)
    assert targets(trees) == targets(turns)
    assert all((turn.weight_L == own).all() for turn, own in zip(turns, kept, strict=True))
    units: dict[int, list[int]] = {}
    for place, each in enumerate(trees):
        assert each.unit is not None and each.channel == 3
        units.setdefault(each.unit, []).append(place)
        # A parent stands before, in its unit; the first one of a unit gives it its number.
        assert (each.parent is None) == (each.unit == place)
        assert each.parent is None or each.unit <= each.parent < place
    sizes = [sum(len(trees[i].input_ids_L) for i in places) for places in units.values()]
    assert max(sizes) <= CAPACITY
    assert sum(sizes) < sum(len(turn.input_ids_L) for turn in turns)
    assert any(each.truncated for each in trees) == any(turn.truncated for turn in turns)
    # Back again: a sample for each path, and no target twice.
    paths = []
    for places in units.values():
        first = places[0]
        tree = [trees[i] for i in places]
        tree = [
            replace(each, parent=None if each.parent is None else each.parent - first)
            for each in tree
        ]
        paths += repeat_beginnings(tree)
    assert targets([replace(path, unit=None) for path in paths]) == targets(turns)
    assert all(path.parent is None for path in paths)


def test_a_turn_that_goes_on_where_another_ends_is_one_sample() -> None:
    first = sample(range(30), {28: 1.0, 29: 1.0})
    second = sample(range(40), {38: 1.0, 39: 0.5})
    (only,) = share_beginnings([first, second], 100)
    assert only.input_ids_L.tolist() == list(range(40))
    assert np.flatnonzero(only.weight_L).tolist() == [28, 29, 38, 39]
    # In one pack they do not fit, so that the beginning is repeated.
    assert [len(each.input_ids_L) for each in share_beginnings([first, second], 39)] == [30, 40]


def test_a_beginning_of_few_tokens_is_not_shared() -> None:
    one = sample([*range(LEAST_SHARED - 1), 90, 91], {LEAST_SHARED: 1.0})
    other = sample([*range(LEAST_SHARED - 1), 80, 81], {LEAST_SHARED: 1.0})
    assert [each.parent for each in share_beginnings([one, other], 100)] == [None, None]
    assert share_beginnings([], 100) == []


def test_paths_keep_the_fields_of_their_answers() -> None:
    prompt = replace(
        sample(range(3), {}),
        extra={"value_S": 0.0, "ref_logprob_L": np.array([0.0, 0.1, 0.2])},
        unit=0,
    )
    answers = [
        replace(
            sample([7, 8], {0: 1.0, 1: 1.0}),
            extra={"value_S": value, "ref_logprob_L": np.array([value, 0.5])},
            parent=0,
            unit=0,
        )
        for value in (1.0, 0.0)
    ]
    paths = repeat_beginnings([prompt, *answers])
    assert [path.input_ids_L.tolist() for path in paths] == [[0, 1, 2, 7, 8]] * 2
    assert [path.weight_L.tolist() for path in paths] == [[0, 0, 0, 1, 1]] * 2
    assert [path.extra["value_S"] for path in paths] == [1.0, 0.0]
    found = np.asarray(paths[0].extra["ref_logprob_L"]).tolist()
    assert found == [0.0, 0.1, 0.2, 1.0, 0.5]
    assert [(path.parent, path.unit) for path in paths] == [(None, 0)] * 2
