"""The same samples in the same step on any number of ranks; labels never cross a sample."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain_dist.data.collate import collate, filler
from posttrain_dist.data.loader import Examples, PackedSource, write_examples
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Batch, Example

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
    write_examples(folder / "train", [example(i) for i in range(SIZE)])
    (folder / "summary.json").write_text(json.dumps({"channels": ["a", "b", "c"]}))
    return Examples.open(folder, "train")


def source(
    examples: Examples, world: int = 1, rank: int = 0, micro: int = 1, batch: int = 5, seed: int = 3
) -> PackedSource:
    return PackedSource(
        examples,
        max_length=32,
        window=16,
        seed=seed,
        batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world=world,
    )


def samples(batches: Iterable[Batch]) -> list[int]:
    return sorted(i for batch in batches for i in batch.sample_id_S if i >= 0)


def test_examples_come_back_as_written(prepared: Examples) -> None:
    assert (len(prepared), prepared.channels) == (SIZE, ["a", "b", "c"])
    for i in range(SIZE):
        wrote, read = example(i), prepared[i]
        assert read.input_ids_L.tolist() == wrote.input_ids_L.tolist()
        assert read.weight_L.tolist() == wrote.weight_L.tolist()
        assert prepared.lengths[i] == len(wrote.input_ids_L)
        meta = (read.channel, read.sample_id, read.truncated)
        assert meta == (wrote.channel, wrote.sample_id, wrote.truncated)


def test_an_empty_split_has_no_batch(tmp_path: Path) -> None:
    write_examples(tmp_path / "eval", [])
    (tmp_path / "summary.json").write_text('{"channels": ["a"]}')
    empty = Examples.open(tmp_path, "eval")
    assert len(empty) == 0
    assert list(source(empty).eval_batches()) == []
    with pytest.raises(DataError, match="no sample to train on"):
        source(empty).total_steps(steps=5)
    with pytest.raises(DataError, match="is no prepared data folder"):
        Examples.open(tmp_path, "train")


def test_labels_are_the_next_token_of_the_same_sample() -> None:
    batch = collate([example(i) for i in (4, 0, 9)])
    inputs = batch.input_ids_T[batch.supervised_N]
    assert torch.equal(inputs + 1, batch.labels_N)  # ids count up inside a sample
    wanted = []
    for i, start in zip((4, 0, 9), batch.cu_seqlens_S, strict=False):
        for place, weight in enumerate(example(i).weight_L.tolist()):
            if weight:
                wanted.append((start + place - 1, 1000 * (i + 1) + place, i % 3, weight))
    columns = (batch.supervised_N, batch.labels_N, batch.channel_N, batch.weight_N)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == wanted
    assert batch.sample_id_S == [40, 0, 90]
    assert batch.num_tokens == len(batch.input_ids_T) == batch.cu_seqlens_S[-1]
    assert torch.equal(batch.input_ids_T % 1000, batch.position_ids_T)


def test_a_first_token_with_a_weight_is_still_no_target() -> None:
    wrong = example(1)
    wrong.weight_L[0] = 1
    assert 2000 not in collate([example(0), wrong]).labels_N.tolist()
    assert wrong.weight_L[0] == 1  # the caller's array is left alone


def test_filler_weighs_nothing() -> None:
    batch = filler(2)
    assert (batch.num_tokens, batch.weight_N.sum(), batch.sample_id_S) == (0, 0, [-1])
    assert (batch.cu_seqlens_S, batch.channel_N.tolist()) == ([0, 2], [2])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
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
