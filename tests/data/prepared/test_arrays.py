"""What is written comes back, in bounded memory, in parts or at once; torn splits are refused."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_dist.data.prepared.arrays import Examples, SplitWriter, flatten
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Example


def example(i: int) -> Example:
    draw = random.Random(i)
    length = draw.randint(1, 20)
    weight = np.array([draw.choice([0, 0, 1, 0.1 * i]) for _ in range(length)], np.float32)
    ids = np.array([draw.randrange(1 << 31) for _ in range(length)], np.int32)
    return Example(ids, weight, channel=i % 3, sample_id=i << 33, truncated=i % 5 == 0)


def plain(ids: Any, weights: Any, sample_id: int = 0) -> Example:
    return Example(np.asarray(ids, np.int32), np.asarray(weights, np.float32), 0, sample_id)


def write(folder: Path, numbers: range, source: int = 0) -> Path:
    with SplitWriter(folder) as writer:
        middle = len(numbers) // 3
        for part in (numbers[:middle], numbers[middle:middle], numbers[middle:]):
            writer.append(flatten([example(i) for i in part]), source)
    return folder


def open_all(folder: Path) -> Examples:
    return Examples.open(folder, "all", channels=["a", "b", "c"])


def check(examples: Examples, numbers: Sequence[int]) -> None:
    assert len(examples) == len(numbers)
    for at, i in enumerate(numbers):
        wrote, read = example(i), examples[at]
        assert read.input_ids_L.tolist() == wrote.input_ids_L.tolist()
        assert read.weight_L.tolist() == wrote.weight_L.tolist()
        assert (read.input_ids_L.dtype, read.weight_L.dtype) == (np.int32, np.float32)
        meta = (read.channel, read.sample_id, read.truncated)
        assert meta == (wrote.channel, wrote.sample_id, wrote.truncated)
        assert examples.lengths[at] == len(wrote.input_ids_L)
        # A first token is nobody's target, whatever it weighs.
        assert examples.supervised[at] == sum(w > 0 for w in wrote.weight_L[1:].tolist())
        assert (examples.channel_ids[at], examples.sample_ids[at]) == meta[:2]


def test_examples_come_back_as_written(tmp_path: Path) -> None:
    write(tmp_path / "samples", range(200), source=4)
    examples = open_all(tmp_path)
    check(examples, range(200))
    assert examples.channels == ["a", "b", "c"]
    assert set(examples.sources.tolist()) == {4}


def test_a_split_is_a_choice_of_samples(tmp_path: Path) -> None:
    write(tmp_path / "samples", range(20))
    np.save(tmp_path / "train.npy", np.array([7, 19, 0, 2]))
    (tmp_path / "summary.json").write_text(json.dumps({"channels": ["x", "y", "z"]}))
    examples = Examples.open(tmp_path, "train")
    check(examples, [7, 19, 0, 2])
    assert examples.channels == ["x", "y", "z"]
    with pytest.raises(DataError, match="is no prepared data folder"):
        Examples.open(tmp_path, "eval")


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 0.5, 1e-30, 3e38]), min_size=1, max_size=30),
        max_size=12,
    )
)
def test_any_weights_come_back(
    tmp_path_factory: pytest.TempPathFactory, samples: list[list[float]]
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    with SplitWriter(folder / "samples") as writer:
        for weights in samples:
            writer.append(flatten([plain(range(len(weights)), weights)]))
    read = open_all(folder)
    assert [read[i].weight_L.tolist() for i in range(len(read))] == [
        np.float32(weights).tolist() for weights in samples
    ]


def test_the_writer_may_be_given_the_same_array_again(tmp_path: Path) -> None:
    ids, weights = np.arange(4, dtype=np.int32), np.ones(4, np.float32)
    with SplitWriter(tmp_path / "samples") as writer:
        for i in range(3):
            ids += 10
            weights[:] = i
            writer.append(flatten([plain(ids, weights, sample_id=i)]))
        assert writer.num_samples == 3
    read = open_all(tmp_path)
    assert [read[i].input_ids_L[0] for i in range(3)] == [10, 20, 30]
    assert [read[i].weight_L[3] for i in range(3)] == [0, 1, 2]


def test_writing_takes_bounded_memory_and_little_disk(tmp_path: Path) -> None:
    ids = np.arange(1000, dtype=np.int32)
    weights = np.repeat(np.float32([0, 1, 0, 1]), 250)
    tracemalloc.start()
    with SplitWriter(tmp_path / "samples") as writer:
        for i in range(5000):
            writer.append(flatten([plain(ids, weights, sample_id=i)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    written = sum(file.stat().st_size for file in (tmp_path / "samples").iterdir())
    assert peak < 8e6 < 20e6 < written  # 20 MB of tokens went through
    assert written < 1.03 * 4 * 1000 * 5000  # next to them the weights take nothing


def test_an_unfinished_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), SplitWriter(tmp_path / "samples") as writer:
        writer.append(flatten([plain([1, 2], [0, 1])]))
        raise ZeroDivisionError
    with pytest.raises(DataError, match="is no prepared data folder"):
        open_all(tmp_path)


@pytest.mark.parametrize("name", ["tokens", "run_weights", "offsets", "run_offsets", "ids"])
def test_a_split_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "samples", range(20))
    file = tmp_path / "samples" / f"{name}.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="is no prepared data folder"):
        open_all(tmp_path)
    # Whole in itself, but shorter than the others.
    write(tmp_path / "other", range(19))
    file.write_bytes((tmp_path / "other" / f"{name}.npy").read_bytes())
    with pytest.raises(DataError, match=r"has .* entries, not"):
        open_all(tmp_path)
