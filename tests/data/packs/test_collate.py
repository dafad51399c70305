"""Labels never cross a sample; padding of the targets changes nothing that is computed."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy

from posttrain_dist.data.packs.collate import collate, filler
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Batch, Example
from posttrain_dist.objectives.sft import Sft


def example(i: int, first: int | None = None) -> Example:
    draw = random.Random(i)
    length = draw.randint(2, 20)
    weight = np.array([0, *(draw.choice([0, 1, 0.5]) for _ in range(length - 1))], np.float32)
    weight[-1] = 1
    # Token ids tell their sample and place.
    ids = np.arange(length, dtype=np.int32) + (1000 * (i + 1) if first is None else first)
    return Example(ids, weight, channel=i % 3, sample_id=i * 10)


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
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert rows[: batch.num_targets] == wanted
    assert batch.sample_id_S == [40, 0, 90]
    assert batch.num_tokens == len(batch.input_ids_T) == batch.cu_seqlens_S[-1]
    assert torch.equal(batch.input_ids_T % 1000, batch.position_ids_T)


def test_the_host_knows_what_kernels_ask_for() -> None:
    rows = [example(i) for i in (4, 0, 9)]
    batch = collate(rows)
    assert batch.bounds_S.tolist() == batch.cu_seqlens_S
    assert batch.bounds_S.dtype == torch.int32
    assert batch.max_seqlen == max(len(row.input_ids_L) for row in rows)
    assert batch.weight_sum == sum(float(row.weight_L.sum(dtype=np.float64)) for row in rows)
    assert batch.num_targets == sum(int((row.weight_L > 0).sum()) for row in rows)


@pytest.mark.parametrize(
    ("targets", "padded"), [(0, 128), (1, 128), (127, 128), (128, 128), (129, 256), (256, 256)]
)
def test_targets_are_padded_to_a_multiple(targets: int, padded: int) -> None:
    weight = np.zeros(400, np.float32)
    weight[1 : 1 + targets] = 2
    batch = collate([Example(np.arange(400, dtype=np.int32), weight, 1, 0)])
    columns = (batch.supervised_N, batch.labels_N, batch.channel_N, batch.weight_N)
    assert [len(column) for column in columns] == [padded] * 4
    assert batch.weight_N.tolist() == [2] * targets + [0] * (padded - targets)
    assert batch.weight_sum == 2 * targets
    assert torch.equal(batch.supervised_N + 1, batch.labels_N)
    assert int(batch.supervised_N.min()) >= 0
    assert int(batch.labels_N.max()) < 400


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_padding_changes_neither_loss_nor_gradient_nor_table(impl: str) -> None:
    batch = collate([example(i, first=5 * i) for i in range(6)])
    assert 0 < batch.num_targets < len(batch.labels_N)
    cut = slice(batch.num_targets)
    bare = replace(
        batch,
        supervised_N=batch.supervised_N[cut],
        labels_N=batch.labels_N[cut],
        channel_N=batch.channel_N[cut],
        weight_N=batch.weight_N[cut],
    )
    torch.manual_seed(0)
    hidden_TD = torch.randn(len(batch.input_ids_T), 8, dtype=torch.float64)
    weight_VD = torch.randn(64, 8, dtype=torch.float64)

    def run(batch: Batch) -> list[torch.Tensor]:
        hidden, weight = (x.clone().requires_grad_() for x in (hidden_TD, weight_VD))
        result = linear_cross_entropy(
            hidden,
            weight,
            batch.labels_N,
            supervised=batch.supervised_N,
            token_weight=batch.weight_N,
            channel=batch.channel_N,
            num_channels=3,
            denominator=batch.weight_sum,
            impl=impl,
        )
        result.loss.backward()
        return [result.loss, hidden.grad, weight.grad, result.channels_C4]

    for padded, plain in zip(run(batch), run(bare), strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-14)
    counts = [sum(int((e.weight_L > 0).sum()) for e in map(example, (c, c + 3))) for c in range(3)]
    assert run(batch)[3][:, 3].tolist() == counts


def test_a_first_token_with_a_weight_is_still_no_target() -> None:
    wrong = example(1)
    wrong.weight_L[0] = 1
    assert 2000 not in collate([example(0), wrong]).labels_N.tolist()
    assert wrong.weight_L[0] == 1  # the caller's array is left alone


def test_a_row_of_one_token_has_no_target() -> None:
    batch = collate([Example(np.array([7], np.int32), np.ones(1, np.float32), 0, 3)])
    assert (batch.num_targets, batch.weight_sum, batch.num_tokens) == (0, 0.0, 1)
    assert set(batch.supervised_N.tolist()) == {0}


def test_filler_weighs_nothing() -> None:
    batch = filler(Sft(), 2)
    assert (batch.num_tokens, batch.weight_N.sum(), batch.sample_id_S) == (0, 0, [-1])
    assert (batch.weight_sum, batch.num_targets) == (0, 0)
    assert (batch.cu_seqlens_S, set(batch.channel_N.tolist())) == ([0, 2], {2})


def test_a_token_out_of_range_names_sample_and_place() -> None:
    rows = [example(0), example(1)]
    largest = int(rows[1].input_ids_L[-1])
    assert collate(rows, vocab_size=largest + 1).num_tokens == sum(len(r.input_ids_L) for r in rows)
    place = len(rows[1].input_ids_L) - 1
    with pytest.raises(DataError, match=f"sample 10 holds token {largest} at place {place},"):
        collate(rows, vocab_size=largest)
    rows[0].input_ids_L[1] = -100
    with pytest.raises(DataError, match="sample 0 holds token -100 at place 1, outside"):
        collate(rows, vocab_size=largest + 1)


def test_moving_a_batch_keeps_every_field() -> None:
    batch = collate([example(0)])
    moved = batch.to(torch.device("cpu"))
    for name in Batch.__slots__:
        old, new = getattr(batch, name), getattr(moved, name)
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
