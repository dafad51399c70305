"""Samples that stay together: a prompt and its answers, written, mapped, packed and collated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from posttrain_dist.data.packs.balance import Cost
from posttrain_dist.data.packs.loader import PackedSource
from posttrain_dist.data.packs.probe import make_probe
from posttrain_dist.data.prepared.arrays import Examples, SplitWriter, flatten
from posttrain_dist.data.prepared.units import Units
from posttrain_dist.flow import By, Example, Extra
from posttrain_dist.objectives.base import TokenLoss


class Compared(TokenLoss):
    extra = (Extra("role_S", index=True, by=By.data), Extra("value_S", by=By.data))


def sample(ids: list[int], parent: int | None, unit: int, value: float) -> Example:
    role = -1 if parent is None else 0
    weight_L = np.full(len(ids), float(role == 0), np.float32)
    extra = {"role_S": role, "value_S": value}
    ids_L = np.array(ids, np.int32)
    return Example(ids_L, weight_L, 0, -1, extra=extra, parent=parent, unit=unit)


def prepared(folder: Path, pairs: int = 5) -> Examples:
    """Each pair: a prompt of 3 tokens, and answers of 2 and of 1; two chunks."""
    with SplitWriter(folder / "samples") as writer:
        for chunk in (range(2), range(2, pairs)):
            examples: list[Example] = []
            for i in chunk:
                first = len(examples)
                examples += [
                    sample([10 * i, 10 * i + 1, 10 * i + 2], None, first, 0.0),
                    sample([10 * i + 3, 10 * i + 4], first, first, 1.0),
                    sample([10 * i + 5], first, first, 0.0),
                ]
            number = writer.num_samples
            arrays = flatten(examples)
            writer.append(arrays | {"ids": np.arange(number, number + len(examples))})
    np.save(folder / "train.npy", np.arange(3, 3 * pairs))  # without the first pair
    return Examples.open(folder, "train", ["a"])


def test_units_are_planned_whole_and_collated_as_trees(tmp_path: Path) -> None:
    examples = prepared(tmp_path)
    assert examples.units.lengths.tolist() == [6] * 4
    # The first token of an answer is a target too: the prompt's last token predicts it.
    assert examples.units.supervised.tolist() == [3] * 4
    source = PackedSource(
        examples,
        Compared(),
        max_length=13,
        window=64,
        seed=0,
        batch_size=2,
        micro_batch_size=1,
        rank=0,
        world=1,
    )
    assert source.total_steps(epochs=1) == 1
    assert sorted(source.sample_ids(1)) == list(range(3, 15))
    for batch in source.step(1):
        assert batch.unit_S == [0, 0, 0, 1, 1, 1]
        assert batch.parent_S == [-1, 0, 0, -1, 3, 3]
        assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 3] * 2
        assert batch.num_targets == 6
        assert batch.sample_N[:6].tolist() == [1, 1, 2, 4, 4, 5]
        assert batch.supervised_N[:6].tolist() == [2, 3, 2, 8, 9, 8]
        assert torch.equal(batch.labels_N[:3], batch.input_ids_T[3:6])
        assert batch.extra["role_S"].tolist() == [-1, 0, 0] * 2 == batch.host_S["role_S"]
        assert batch.extra["value_S"].tolist() == [0, 1, 0] * 2


def test_a_unit_drawn_twice_in_a_row_is_two(tmp_path: Path) -> None:
    from posttrain_dist.data.packs.collate import collate

    examples = prepared(tmp_path)
    pair = [examples[i] for i in range(3)]
    batch = collate([*pair, *pair], own_rows=True)
    assert batch.unit_S == [0, 0, 0, 1, 1, 1]
    assert batch.parent_S == [-1, 0, 0, -1, 3, 3]
    assert batch.supervised_N[:6].tolist() == [3, 4, 5, 9, 10, 11]  # the targets' own states


def test_sizes_of_units_are_those_of_their_paths() -> None:
    """Random trees, against each sample's path one by one."""
    draw = np.random.default_rng(0)
    number: list[int] = []
    parents: list[int] = []
    for _ in range(40):
        size = int(draw.integers(1, 7))
        first = len(number)
        number += [first] * size
        for place in range(size):
            parent = int(draw.integers(-1, place)) if place else -1
            parents.append(0 if parent < 0 else place - parent)
    lengths = draw.integers(1, 20, len(number)).astype(np.int32)
    column = np.arange(len(number), dtype=np.int16)
    units = Units.of(
        np.array(number, np.int64),
        lengths,
        lengths,
        column,
        column,
        np.array(parents, np.int32),
    )
    inserted, prefix = 3, 2
    tokens, keys, pairs, causal = [], [], [], []
    for unit in range(len(units)):
        rows = []
        for sample in units.samples(unit):
            own, before, at = int(lengths[sample]), 0, sample
            while parents[at]:
                at -= parents[at]
                before += int(lengths[at])
            virtual = inserted * (at == sample)
            rows.append((own + virtual, own + before + inserted + prefix, own * (own + 2 * before)))
        tokens.append(sum(own for own, _, _ in rows))
        keys.append(sum(path for _, path, _ in rows))
        pairs.append(sum(own * path for own, path, _ in rows))
        causal.append(sum(both for _, _, both in rows))
    assert units.tokens(inserted).tolist() == tokens
    assert units.keys(inserted, prefix).tolist() == keys
    assert units.pairs(inserted, prefix).tolist() == pairs
    assert units.causal_pairs().tolist() == causal
    assert Cost(token=0, pair=1, target=0).of_units(units).tolist() == causal


def test_the_probe_of_a_model_has_an_answer_behind_its_prompt(tmp_path: Path) -> None:
    batch = make_probe(prepared(tmp_path))
    assert batch.parent_S == [-1, -1, 1]
    assert batch.input_ids_T.tolist() == [10, 11, 12, 40, 41, 42, 45]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2, 3]
    only = make_probe(prepared(tmp_path / "one", pairs=2))
    assert only.parent_S == [-1, 0]
