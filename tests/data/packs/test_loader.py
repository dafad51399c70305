"""The same samples in the same step on any number of ranks, from any cursor, with any mixture."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_dist.data import MixBy
from posttrain_dist.data.packs.loader import PackedSource
from posttrain_dist.data.packs.mixing import Mixture, SourceSpec
from posttrain_dist.data.packs.order import Order
from posttrain_dist.data.prepared.arrays import Examples, SplitWriter, flatten
from posttrain_dist.errors import ConfigError, DataError
from posttrain_dist.flow import Batch, Example
from posttrain_dist.objectives.sft import Sft

SIZE = 53


def example(i: int) -> Example:
    draw = random.Random(i)
    length = draw.randint(2, 20)
    weight = np.array([0, *(draw.choice([0, 1, 0.5]) for _ in range(length - 1))], np.float32)
    weight[-1] = 1
    # Token ids tell their sample and place.
    ids = np.arange(length, dtype=np.int32) + 1000 * (i + 1)
    return Example(ids, weight, channel=i % 3, sample_id=i * 10, truncated=i % 5 == 0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    folder = tmp_path_factory.mktemp("prepared")
    with SplitWriter(folder / "samples") as writer:
        for i in range(SIZE):
            e = example(i)
            writer.append(flatten([e]))
    return Examples.open(folder, "all", channels=["a", "b", "c"])


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    """120 samples, every third one from source 1; sample ids are indices."""
    folder = tmp_path_factory.mktemp("two")
    with SplitWriter(folder / "samples") as writer:
        for i in range(120):
            e = replace(example(i), channel=0, sample_id=i)
            writer.append(flatten([e]), source=int(i % 3 == 0))
    return Examples.open(folder, "all", channels=["a"])


def mixture(examples: Examples, specs: list[SourceSpec], by: MixBy = MixBy.rows) -> Mixture:
    return Mixture(examples.sources, examples.supervised, specs, by, seed=3)


def source(
    examples: Examples,
    world: int = 1,
    rank: int = 0,
    micro: int = 1,
    batch: int = 5,
    seed: int = 3,
    mix: Mixture | None = None,
) -> PackedSource:
    return PackedSource(
        examples,
        Sft(),
        max_length=32,
        window=16,
        seed=seed,
        batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world=world,
        mixture=mix,
    )


def samples(batches: Iterable[Batch]) -> list[int]:
    return sorted(i for batch in batches for i in batch.sample_id_S if i >= 0)


def test_an_empty_split_has_no_batch(tmp_path: Path) -> None:
    SplitWriter(tmp_path / "samples").close()
    empty = Examples.open(tmp_path, "all", channels=["a"])
    assert len(empty) == 0
    assert list(source(empty).eval_batches()) == []
    with pytest.raises(DataError, match="no sample to train on"):
        source(empty).total_steps(steps=5)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_holds_the_same_samples_in_every_layout(
    prepared: Examples, world: int, micro: int
) -> None:
    yardstick = source(prepared)
    ranks = [source(prepared, world, rank, micro) for rank in range(world)]
    for k in (1, 2, 7, 9):
        shares = [rank.step(k) for rank in ranks]
        assert samples([batch for share in shares for batch in share]) == samples(yardstick.step(k))
        micros = math.ceil(5 / micro)
        assert {len(share) for share in shares} == {math.ceil(micros / world)}
        packs = sum(batch.num_tokens for share in shares for batch in share)
        assert packs == sum(batch.num_tokens for batch in yardstick.step(k))
        assert max(batch.num_tokens for share in shares for batch in share) <= 32 * micro


def test_steps_are_a_pure_function_of_seed_and_step(prepared: Examples) -> None:
    once = source(prepared)
    forward = [samples(once.step(k)) for k in range(1, 12)]
    again = [samples(source(prepared).step(k)) for k in range(11, 0, -1)]
    assert forward == again[::-1]
    assert forward != [samples(source(prepared, seed=4).step(k)) for k in range(1, 12)]


def test_epochs_end_at_their_boundary(prepared: Examples) -> None:
    everything = sorted(i * 10 for i in range(SIZE))
    run = source(prepared)
    total = run.total_steps(epochs=2)
    steps = [run.step(k) for k in range(1, total + 1)]
    seen = Counter(i for step in steps for i in samples(step))
    assert seen == Counter(dict.fromkeys(everything, 2))
    packs = [len(step) for step in steps]
    assert packs[:-1] == [5] * (total - 1)
    assert 0 < packs[-1] <= 5
    # The last step of one epoch is not filled up from the next, on three ranks either.
    one = source(prepared)
    last = one.total_steps()
    parts = [source(prepared, 3, rank) for rank in range(3)]
    assert {part.total_steps(epochs=1) for part in parts} == {last}
    shares = [part.step(last) for part in parts]
    assert len({len(share) for share in shares}) == 1
    assert samples(chain.from_iterable(shares)) == samples(one.step(last))
    first_epoch = [i for k in range(1, last + 1) for i in samples(one.step(k))]
    assert sorted(first_epoch) == everything


def test_part_of_an_epoch_and_steps_beyond_one(prepared: Examples) -> None:
    run = source(prepared, batch=1)
    packs = run.total_steps(epochs=1)
    assert run.total_steps(epochs=0.5) == -(-packs // 2)
    assert run.total_steps(epochs=1.5) > packs
    assert run.total_steps(steps=3 * packs) == 3 * packs
    seen = Counter(i for k in range(1, 3 * packs + 1) for i in samples(run.step(k)))
    assert set(seen) == {i * 10 for i in range(SIZE)}
    assert set(seen.values()) <= {2, 3, 4}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_sample_once(prepared: Examples, world: int) -> None:
    shares = [list(source(prepared, world, rank, 2).eval_batches()) for rank in range(world)]
    assert samples(chain.from_iterable(shares)) == [i * 10 for i in range(SIZE)]
    assert len({len(share) for share in shares}) == 1


def test_the_cursor_is_the_only_state(two_sources: Examples) -> None:
    # Packs of an epoch vary with the draw, so a resumed run must find its epoch by itself.
    specs = [
        SourceSpec(name="a", weight=0.3),
        SourceSpec(name="b", weight=0.7, schedule={3: 0.3, 20: 0.6}),
    ]
    mix = mixture(two_sources, specs)
    run = source(two_sources, mix=mix)
    in_turn = [run.sample_ids(k) for k in range(1, 60)]
    assert sum(map(len, in_turn)) > 4 * 120
    for k in (59, 1, 31, 20, 19, 3):
        assert source(two_sources, mix=mix).sample_ids(k) == in_turn[k - 1]
    shares = [source(two_sources, 8, rank, 2, mix=mix).step(31) for rank in range(8)]
    assert samples(chain.from_iterable(shares)) == sorted(in_turn[30])


@pytest.mark.parametrize("by", [MixBy.rows, MixBy.tokens])
def test_an_epoch_of_a_mixture_has_the_asked_shares(two_sources: Examples, by: MixBy) -> None:
    mix = mixture(two_sources, [SourceSpec(name="a", weight=1), SourceSpec(name="b", weight=3)], by)
    run = source(two_sources, mix=mix)
    amounts = [0, 0]
    for k in range(1, run.total_steps(epochs=4) + 1):
        for batch in run.step(k):
            for i in batch.sample_id_S:
                targets = int(np.count_nonzero(example(i).weight_L))
                amounts[i % 3 == 0] += 1 if by is MixBy.rows else targets
    assert amounts[1] / sum(amounts) == pytest.approx(0.75, rel=0.01)


def test_weights_change_at_their_step(two_sources: Examples) -> None:
    specs = [
        SourceSpec(name="a", schedule={6: 0.0, 11: 1.0}),
        SourceSpec(name="b", schedule={1: 0.0, 6: 1.0}),
    ]
    mix = mixture(two_sources, specs)
    run = source(two_sources, mix=mix)
    for k in range(1, 30):
        seen = {int(i % 3 == 0) for i in run.sample_ids(k)}
        assert seen == ({0} if k < 6 else {1} if k < 11 else {0, 1})


def test_a_phase_cut_short_counts_as_the_part_of_an_epoch_that_it_took(tmp_path: Path) -> None:
    # Every pack is one sample, so an epoch has 120.
    with SplitWriter(tmp_path / "samples") as writer:
        for i in range(120):
            e = Example(np.arange(32, dtype=np.int32), np.ones(32, np.float32), 0, sample_id=i)
            writer.append(flatten([e]), source=i % 2)
    examples = Examples.open(tmp_path, "all", channels=["a"])
    specs = [
        SourceSpec(name="a", schedule={6: 0.0, 11: 1.0}),
        SourceSpec(name="b", schedule={1: 0.0, 6: 1.0}),
    ]
    mix = mixture(examples, specs)

    def steps(**end: float) -> int:
        return source(examples, mix=mix).total_steps(**end)

    # Two phases of 5 steps of 5 packs, then the rest.
    assert steps(epochs=49.5 / 120) == 10
    assert steps(epochs=50.5 / 120) == 11
    assert steps(epochs=0.25) == 6
    assert [steps(epochs=epochs) for epochs in (1, 2)] == [24, 48]
    assert steps(epochs=1 + 51 / 120) == math.ceil((120 + 51) / 5)
    assert steps(tokens=50 * 32) == 10
    assert steps(tokens=50 * 32 + 1) == 11


@pytest.mark.parametrize("by", [MixBy.rows, MixBy.tokens])
@pytest.mark.parametrize("steps", [(), (2,), (6,), (4, 5, 7, 10)])
def test_a_schedule_that_changes_nothing_leaves_out_no_row(
    two_sources: Examples, by: MixBy, steps: tuple[int, ...]
) -> None:
    # Weights as the sources are large: an epoch is every row once, and phases cut epochs short.
    amounts = two_sources.supervised if by is MixBy.tokens else np.ones(120)
    sizes = np.bincount(two_sources.sources, amounts).tolist()
    specs = [
        SourceSpec(name=str(i), weight=size, schedule=dict.fromkeys(steps, size))
        for i, size in enumerate(sizes)
    ]
    for epochs in (1, 3):
        run = source(two_sources, mix=mixture(two_sources, specs, by))
        total = run.total_steps(epochs=epochs)
        seen = Counter(i for k in range(1, total + 1) for i in run.sample_ids(k))
        assert total >= max(steps, default=0)  # all phases begin
        assert seen == Counter(dict.fromkeys(range(120), epochs))


WEIGHT = st.just(0.0) | st.floats(0.01, 1)


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    schedule=st.dictionaries(st.integers(1, 40), st.lists(WEIGHT, min_size=3, max_size=3)),
    by=st.sampled_from(MixBy),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_rows_come_in_passes_over_a_whole_run(
    sizes: list[int],
    schedule: dict[int, list[float]],
    by: MixBy,
    batch_size: int,
    seed: int,
) -> None:
    chance = np.random.default_rng(seed)
    sources = chance.permutation(np.repeat(np.arange(len(sizes)), sizes))
    lengths = chance.integers(1, 33, len(sources)).astype(np.int32)
    supervised = chance.integers(0, lengths)
    measure = np.maximum(supervised, 1) if by is MixBy.tokens else np.ones(len(sources), int)
    weights = {
        k: w[: len(sizes)] if any(w[: len(sizes)]) else [1.0] * 3 for k, w in schedule.items()
    }
    specs = [
        SourceSpec(name=str(s), schedule={step: w[s] for step, w in weights.items()})
        for s in range(len(sizes))
    ]
    mix = Mixture(sources, supervised, specs, by, seed)
    order = Order(lengths, max_length=32, window=8, seed=seed, batch_size=batch_size, mixture=mix)
    came, asked, at = np.zeros(len(sources), int), np.zeros(len(sizes)), 0.0
    bounds = [*mix.phase_starts, 60]
    for phase, (start, end) in enumerate(pairwise(bounds)):
        packs = [pack for k in range(start, end) for pack in order.packs(k)]
        amounts = np.array([share.amount for share in mix.phases[phase]])
        epoch = 0
        while packs:
            plan = order.phase_plan(phase).plan(epoch)
            taken, packs = packs[: len(plan)], packs[len(plan) :]
            assert [pack.tolist() for pack in taken] == [
                plan[i].tolist() for i in range(len(taken))
            ]
            # Of what is drawn, no row comes twice before each row of its source came once.
            drawn = np.bincount(plan.order, minlength=len(sources))
            least = np.array([(came + drawn)[sources == s].min() for s in range(len(sizes))])
            assert np.all((came + drawn)[drawn > 0] <= least[sources[drawn > 0]] + 1)
            came = came + np.bincount(np.concatenate([*taken, plan.order[:0]]), minlength=len(came))
            # Whole epochs of a run end at whole numbers, and there each source gave what all
            # phases together asked of it, up to the rounding of one row.
            part = len(taken) / len(plan) if len(plan) else 1.0
            until = at + (math.floor(at) + 1 - at) * part
            asked, at = asked + (until - at) * amounts, until
            if part == 1.0:
                given_ = np.bincount(sources, came * measure, len(sizes))
                of_source = np.bincount(sources, drawn, len(sizes))
                most = np.array([measure[sources == s].max() for s in range(len(sizes))])
                assert np.all((given_ - asked)[amounts > 0] >= -0.5 - 1e-6)
                assert np.all((given_ - asked)[of_source > 0] <= most[of_source > 0] - 0.5 + 1e-6)
            epoch += 1


@pytest.mark.parametrize("tokens", [1, 33, 500, 573, 574, 1500, 5000])
def test_a_token_budget_ends_with_the_pack_that_reaches_it(prepared: Examples, tokens: int) -> None:
    endless = source(prepared, batch=1)
    left, packs = tokens, 0
    while left > 0:
        packs += 1
        left -= endless.step(packs)[0].num_tokens
    run = source(prepared)
    assert run.total_steps(tokens=tokens) == math.ceil(packs / 5)
    assert sum(len(run.step(k)) for k in range(1, math.ceil(packs / 5) + 1)) == packs


def test_two_ends_are_refused(prepared: Examples) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps=3, train\.tokens=9"):
        source(prepared).total_steps(steps=3, tokens=9)
    with pytest.raises(ConfigError, match=r"train\.tokens=0"):
        source(prepared).total_steps(tokens=0)


def test_tokens_outside_the_vocabulary_are_refused(prepared: Examples) -> None:
    run = PackedSource(
        prepared,
        Sft(),
        max_length=32,
        window=16,
        seed=3,
        batch_size=60,
        micro_batch_size=60,
        rank=0,
        world=1,
        vocab_size=53_000,  # sample 52 holds the tokens from 53,000 on
    )
    with pytest.raises(
        DataError, match=r"sample 520 holds token 53000 at place 0, outside \[0, 53"
    ):
        run.step(1)
