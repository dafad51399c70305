"""Batches made in a thread: the same ones, errors where they belong, and no thread left."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from posttrain_dist.build import make_source
from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.data.packs.prefetch import Prefetcher
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.dist import Process
from posttrain_dist.errors import DataError
from posttrain_dist.prepare import prepare

CPU = torch.device("cpu")


class Numbers:
    """A source whose step k is one tensor of k; step 3 cannot be made."""

    def __init__(self, prefetchable: bool = True) -> None:
        self.prefetchable = prefetchable
        self.made: list[int] = []

    def step(self, k: int) -> list:
        self.made.append(k)
        self.made_by = threading.current_thread()
        if k == 3:
            raise DataError("cannot be read", where="row 3")
        return [SimpleNamespace(to=lambda _: torch.tensor(k))]

    def sample_ids(self, k: int) -> list[int]:
        return [k]


def batch_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("batches")]


def test_an_error_belongs_to_its_step_and_nothing_is_made_twice() -> None:
    source = Numbers()
    with Prefetcher(source, CPU, last=9) as batches:
        assert [int(batches.step(k)[0]) for k in (1, 2)] == [1, 2]  # 3 has failed by now, unasked
        with pytest.raises(DataError, match="row 3"):
            batches.step(3)
    assert source.made == [1, 2, 3]
    assert batch_threads() == []


def test_nothing_is_made_behind_the_last_step_and_a_jump_is_no_stale_batch() -> None:
    source = Numbers()
    with Prefetcher(source, CPU, last=6) as batches:
        assert int(batches.step(1)[0]) == 1
        assert [int(batches.step(k)[0]) for k in (5, 6)] == [5, 6]
    assert source.made == [1, 2, 5, 6]


def test_what_may_not_be_prefetched_is_made_when_it_is_asked_for() -> None:
    source = Numbers(prefetchable=False)
    with Prefetcher(source, CPU, last=6) as batches:
        for k in (1, 2):
            assert int(batches.step(k)[0]) == k
            assert source.made == list(range(1, k + 1))  # not one step more
            assert source.made_by is threading.current_thread()
        assert batch_threads() == []
    assert batches.sample_ids(2) == [2]
    eager = Numbers()
    with Prefetcher(eager, CPU, last=6) as batches:
        batches.step(1)
    assert eager.made_by is not threading.current_thread()


def test_the_same_batches_while_another_thread_asks_what_they_hold(
    tmp_path, tiny_llama, rows_file
) -> None:
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64, pack_window=8),
            train=TrainConfig(steps=400, batch_size=2),
        )
    )
    prepare(config, tmp_path)
    examples = Examples.open(tmp_path, "train")
    ours, alone = (make_source(config, examples, Process()) for _ in range(2))
    with Prefetcher(ours, CPU, last=400) as prefetched:
        for k in range(1, 401):  # many epochs: each is planned when it is met
            made, ids = prefetched.step(k), ours.sample_ids(k)
            wanted = alone.step(k)
            assert [b.sample_id_S for b in made] == [b.sample_id_S for b in wanted]
            assert all(
                torch.equal(a.input_ids_T, b.input_ids_T) for a, b in zip(made, wanted, strict=True)
            )
            assert sorted(ids) == sorted(i for b in wanted for i in b.sample_id_S)
