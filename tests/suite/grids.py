"""A grid of cases: by default every pair of values once, the whole product under `slow`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(axes: Sequence[Sequence[Any]]) -> set[tuple[int, ...]]:
    """Places of few cases in which any two values of two axes meet (greedy, always the same)."""
    cases = list(product(*(range(len(axis)) for axis in axes)))

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, cases))
    chosen: set[tuple[int, ...]] = set()
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.add(best)
        missing -= pairs(best)
    return chosen


def grid(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize by the product of three or more axes; what pairs do not need is slow."""
    chosen = pairwise(list(axes.values()))
    cases = []
    for places in product(*(range(len(axis)) for axis in axes.values())):
        values = [axis[place] for axis, place in zip(axes.values(), places, strict=True)]
        marks = () if places in chosen else (pytest.mark.slow,)
        cases.append(pytest.param(*values, marks=marks))
    return pytest.mark.parametrize(tuple(axes), cases)
