"""How far two sequences begin alike, against a count by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from posttrain_dist.data.prefix import common_prefix_length


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("abcd", "abxd", 2),
        ("ab", "abc", 2),  # one begins the other
        ("", "a", 0),
        ("same", "same", 4),
        ("\U0001f642a", "\U0001f642b", 1),
        ([{"role": "user"}, {"a": 1}], [{"role": "user"}, {"a": 2}], 1),
    ],
)
def test_common_prefix_length(one: Sequence[Any], other: Sequence[Any], expected: int) -> None:
    assert common_prefix_length(one, other) == common_prefix_length(other, one) == expected
