"""Realised shares are the asked ones, and stay so; rows are drawn in passes; caps hold and pass on
the rest; a phase takes first what an earlier one left.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_dist.data import MixBy
from posttrain_dist.data.packs.mixing import Mixture, MixtureState, SourceSpec
from posttrain_dist.errors import ConfigError, DataError


def mixture(
    sizes: list[int],
    weights: list[float],
    by: MixBy = MixBy.rows,
    caps: list[float | None] | None = None,
    seed: int = 0,
) -> tuple[Mixture, np.ndarray, np.ndarray]:
    """(mixture, source of each sample, supervised tokens of each sample); sources interleaved."""
    random = np.random.default_rng(1)
    sources = random.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int16)
    # Each source has answers of its own typical length.
    supervised = random.integers(1, 40 * (1 + sources.astype(np.int64)) ** 2)
    specs = [
        SourceSpec(name=f"s{i}", weight=weight, max_passes=cap)
        for i, (weight, cap) in enumerate(zip(weights, caps or [None] * len(sizes), strict=True))
    ]
    return Mixture(sources, supervised, specs, by, seed), sources, supervised


@pytest.mark.parametrize("by", [MixBy.rows, MixBy.tokens])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.7, 0.2, 0.1], [5, 0, 1], [0.05, 0.05, 0.9]])
def test_shares_of_an_epoch_are_the_asked_ones(by: MixBy, weights: list[float]) -> None:
    mix, sources, supervised = mixture([3000, 500, 1500], weights, by)
    for epoch in (0, 1, 5):
        amounts = [0, 0, 0]
        for sample in mix.draw(0, epoch).tolist():
            amounts[sources[sample]] += 1 if by is MixBy.rows else int(supervised[sample])
        for amount, weight in zip(amounts, weights, strict=True):
            assert amount / sum(amounts) == pytest.approx(weight / sum(weights), rel=0.01)
        assert mix.amounts(mix.draw(0, epoch)).tolist() == amounts
        whole = len(sources) if by is MixBy.rows else int(supervised.sum())
        assert sum(amounts) == pytest.approx(whole, rel=0.01)  # an epoch is as large as the data


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ([8, 8], [1, 4]),
        ([5, 5, 5], [1, 1, 2]),
        ([1000, 50], [3000, 1]),
        ([200, 200], [1, 3]),
        ([10, 10, 1], [1, 1, 0.001]),
    ],
)
def test_what_rounding_takes_from_one_epoch_it_gives_to_the_next(
    sizes: list[int], weights: list[float]
) -> None:
    mix = mixture(sizes, weights)[0]
    asked = np.array(weights) / sum(weights) * sum(sizes)  # rows of an epoch
    total = np.zeros(len(sizes))
    for epoch in range(1000):
        amounts = mix.amounts(mix.draw(0, epoch))
        assert np.all(abs(amounts - asked) < 1)
        total += amounts
        assert np.all(abs(total - (epoch + 1) * asked) <= 0.5 + 1e-6)
    assert np.all(total > 0)


@pytest.mark.parametrize("by", [MixBy.rows, MixBy.tokens])
def test_no_row_comes_twice_before_each_came_once(by: MixBy) -> None:
    mix, sources, _ = mixture([300, 50, 150], [0.3, 0.5, 0.2], by)
    seen: Counter[int] = Counter()
    upsampled = mix.phases[0][1].passes
    assert upsampled > 3  # and its passes end inside of epochs
    for epoch in range(7):
        drawn = mix.draw(0, epoch).tolist()
        seen.update(drawn)
        for source in range(3):
            counts = [seen[i] for i in np.flatnonzero(sources == source).tolist()]
            assert max(counts) - min(counts) <= 1
    assert seen.total() == sum(len(mix.draw(0, epoch)) for epoch in range(7))


def test_an_epoch_is_known_without_those_before() -> None:
    weights = [0.3, 0.5, 0.2]
    mix, sources, _ = mixture([300, 50, 150], weights)
    in_turn = [sorted(mix.draw(0, epoch).tolist()) for epoch in range(5)]
    alone = mixture([300, 50, 150], weights)[0]
    assert sorted(alone.draw(0, 4).tolist()) == in_turn[4]
    other = mixture([300, 50, 150], weights, seed=1)[0]
    assert sorted(other.draw(0, 4).tolist()) != in_turn[4]
    # Downsampled rows differ between epochs: those of the first are not in the second.
    low = [{i for i in drawn if sources[i] == 0} for drawn in in_turn[:2]]
    assert len(low[0] & low[1]) == 0
    # Each pass is a shuffle of its own: half an epoch's rows are not the same ones in every pass.
    half = mixture([50, 50], [1, 3])[0]
    firsts = {frozenset(half.draw(0, epoch).tolist()) for epoch in (0, 2, 4)}
    assert len(firsts) == 3


def test_a_phase_takes_first_the_rows_that_came_least_often() -> None:
    mix, sources, _ = mixture([8, 8], [1, 1])
    few = np.flatnonzero(sources == 0)
    came = np.zeros(16, np.int32)
    came[few] = [3, 3, 1, 3, 4, 3, 3, 1]

    def drawn(epoch: int, deficit: int = 0) -> list[int]:
        """How often each row of the first source is in a draw, 2.75 epochs into the run."""
        draw = mix.draw(0, epoch, MixtureState(2.75, 0, came, np.array([deficit, 0.0])))
        return np.bincount(draw, minlength=16)[few].tolist()

    # A quarter of an epoch is left, two rows; then eight: again those two, and six of seven.
    assert drawn(0) == [0, 0, 1, 0, 0, 0, 0, 1]
    after = came[few] + drawn(0) + drawn(1)
    assert after[4] == 4 and sorted(after) == [3] + 7 * [4]
    # What the phases before gave too little or too much of comes on top, or is kept back.
    more = drawn(0, deficit=3)
    assert (more[2], more[7], more[4], sum(more)) == (2, 2, 0, 5)
    assert [drawn(epoch, deficit=-6) for epoch in (0, 1)] == [[0] * 8, [0, 0, 2, 0, 0, 0, 0, 2]]
    without = mixture([8, 8], [1, 0])[0].draw(
        0, 0, MixtureState(2.75, 0, came, np.array([0.0, 9.0]))
    )
    assert set(sources[without]) == {0}  # not even to make up a deficit


def test_what_a_cap_keeps_off_goes_to_the_others() -> None:
    mix, sources, _ = mixture([100, 100, 800], [1, 1, 1], caps=[1.0, None, None])
    # 1000 rows: a third each would draw the first source 3.3 times; at most once leaves 900.
    counts = Counter(sources[mix.draw(0, 0)].tolist())
    assert counts == {0: 100, 1: 450, 2: 450}
    shares = mix.phases[0]
    assert [p.capped for p in shares] == [True, False, False]
    assert [p.amount for p in shares] == pytest.approx([100, 450, 450])
    assert [p.passes for p in shares] == pytest.approx([1.0, 4.5, 0.5625])
    assert [p.target for p in shares] == pytest.approx([1 / 3] * 3)
    assert [p.share for p in shares] == pytest.approx([0.1, 0.45, 0.45])
    # The rest can push another one over its cap; where all are capped the epoch is smaller.
    again = mixture([100, 100, 800], [1, 1, 1], caps=[1.0, 4.0, None])[0]
    assert [p.amount for p in again.phases[0]] == pytest.approx([100, 400, 500])
    least = mixture([100, 100, 800], [1, 1, 1], caps=[1.0, 2.0, 0.25])[0]
    assert [p.amount for p in least.phases[0]] == pytest.approx([100, 200, 200])
    assert len(least.draw(0, 3)) == 500


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 60),
            st.floats(0.01, 10),
            st.none() | st.floats(0.1, 20),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_amounts_fill_an_epoch_in_proportion(
    sources: list[tuple[int, float, float | None]],
) -> None:
    sizes, weights, caps = (list(column) for column in zip(*sources, strict=True))
    limits = [float("inf") if c is None else c * n for n, c in zip(sizes, caps, strict=True)]
    if all(limit <= 0.5 for limit in limits):
        return  # refused: rounds to nothing
    amounts = [p.amount for p in mixture(sizes, weights, caps=caps)[0].phases[0]]
    assert sum(amounts) == pytest.approx(min(sum(sizes), sum(limits)))
    assert all(a <= limit * (1 + 1e-9) for a, limit in zip(amounts, limits, strict=True))
    # Those below their cap stand in the proportion of their weights, and no capped one stands
    # below it.
    unit = max(a / w for a, w in zip(amounts, weights, strict=True))
    for a, w, limit in zip(amounts, weights, limits, strict=True):
        assert a == pytest.approx(min(unit * w, limit))


def test_a_schedule_makes_phases() -> None:
    sources = np.repeat([0, 1], 100).astype(np.int16)
    specs = [
        SourceSpec(name="easy", weight=3.0, schedule={500: 1.0, 900: 0.0}),
        SourceSpec(name="hard", schedule={0: 1.0, 900: 2.0}),
    ]
    mix = Mixture(sources, np.ones(200, np.int32), specs, MixBy.rows, 0)
    assert mix.phase_starts == [1, 500, 900]
    assert [[p.share for p in phase] for phase in mix.phases] == [[0.75, 0.25], [0.5, 0.5], [0, 1]]
    drawn = [np.bincount(sources[mix.draw(phase, 0)], minlength=2).tolist() for phase in range(3)]
    assert drawn == [[150, 50], [100, 100], [0, 200]]
    assert [specs[0].weight_at(step) for step in (1, 499, 500, 899, 900)] == [3, 3, 1, 1, 0]


def test_rows_without_a_target_are_drawn_too() -> None:
    supervised = np.array([0, 0, 5, 5], np.int32)
    mix = Mixture(np.zeros(4, np.int16), supervised, [SourceSpec(name="a")], MixBy.tokens, 0)
    assert sorted(mix.draw(0, 3).tolist()) == [0, 1, 2, 3]


def test_wishes_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.s1: a weight is -1"):
        mixture([5, 5], [1, -1])
    with pytest.raises(ConfigError, match=r"s0: a weight is nan"):
        mixture([5, 5], [float("nan"), 1])
    with pytest.raises(ConfigError, match="every weight is 0 from step 1 on"):
        mixture([5, 5], [0, 0])
    with pytest.raises(ConfigError, match=r"data\.sources\.s1\.max_passes: is 0"):
        mixture([5, 5], [1, 1], caps=[None, 0])
    with pytest.raises(ConfigError, match="lets no row through"):
        mixture([5, 5], [1, 1], caps=[0.01, 0.01])
    with pytest.raises(DataError, match=r"data\.sources\.s1: has a weight and no row"):
        mixture([5, 0], [1, 1])
    assert mixture([5, 0], [1, 0])[0].phases[0][1].passes == 0
    specs = [SourceSpec(name="a", schedule={10: 0.0})]
    with pytest.raises(ConfigError, match="every weight is 0 from step 10 on"):
        Mixture(np.zeros(3, np.int16), np.ones(3, np.int32), specs, MixBy.rows, 0)
