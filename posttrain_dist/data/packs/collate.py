"""Examples -> Batch: one packed row, labels shifted inside each sample."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from posttrain_dist.errors import DataError
from posttrain_dist.flow import Batch, Example, Extra

TARGET_MULTIPLE = 128  # of N: kernels and compiled graphs then meet few shapes


class Declares(Protocol):
    """An objective, as far as a batch is concerned."""

    extra: ClassVar[tuple[Extra, ...]]
    own_rows: ClassVar[bool]


def collate(
    examples: Sequence[Example], vocab_size: int | None = None, *, own_rows: bool = False
) -> Batch:
    """Lay samples end to end in one row.

    The hidden state of token i predicts token i + 1 of the same sample; the last token of a
    sample predicts the first tokens of the samples that follow it, if any.

    Args:
        examples: a parent stands before the samples that follow it.
        vocab_size: where given, every token must be below it.
        own_rows: the hidden state of a target itself is used, not that of the token before it.

    Raises:
        DataError: a token is out of range, a parent is not in the row, or samples have different
            `extra` fields; names the sample.
    """
    lengths = [len(example.input_ids_L) for example in examples]
    cu_seqlens_S = [0, *accumulate(lengths)]
    ids_T = np.concatenate([example.input_ids_L for example in examples]).astype(np.int64)
    if vocab_size is not None and (ids_T.min() < 0 or ids_T.max() >= vocab_size):
        raise _out_of_range(examples, vocab_size)
    weight_T = np.concatenate([example.weight_L for example in examples]).astype(np.float32)
    channel_T = np.repeat([example.channel for example in examples], lengths)
    parent_S = _parents(examples)
    position_T = np.arange(len(ids_T)) - np.repeat(cu_seqlens_S[:-1], lengths)
    position_T += np.repeat(_before(lengths, parent_S), lengths)
    predictor_T = np.arange(len(ids_T)) - (not own_rows)  # whose hidden state is used
    for sample, parent in enumerate(parent_S):
        first = cu_seqlens_S[sample]
        if own_rows:
            continue
        if parent < 0:
            weight_T[first] = 0  # the first token of a root is no target
        else:
            predictor_T[first] = cu_seqlens_S[parent + 1] - 1
    sample_T = np.repeat(np.arange(len(examples)), lengths)
    target_N = np.flatnonzero(weight_T)
    num_targets = len(target_N)
    # Padding repeats the last target, whose loss is as finite as it is without padding.
    last = int(target_N[-1]) if num_targets else len(ids_T) - 1
    target_N = _pad(target_N, last)
    weight_N = weight_T[target_N]
    weight_N[num_targets:] = 0
    extra = _extra(examples, target_N, num_targets)
    return Batch(
        input_ids_T=torch.from_numpy(ids_T),
        position_ids_T=torch.from_numpy(position_T),
        cu_seqlens_S=cu_seqlens_S,
        bounds_S=torch.tensor(cu_seqlens_S, dtype=torch.int32),
        max_seqlen=max(lengths),
        # A row of one token has no target, only padding, which must stay inside of the row.
        supervised_N=torch.from_numpy(np.maximum(predictor_T[target_N], 0)),
        labels_N=torch.from_numpy(ids_T[target_N]),
        channel_N=torch.from_numpy(channel_T[target_N].astype(np.int64)),
        sample_N=torch.from_numpy(sample_T[target_N]),
        weight_N=torch.from_numpy(weight_N),
        num_targets=num_targets,
        weight_sum=float(weight_N.sum(dtype=np.float64)),
        sample_id_S=[example.sample_id for example in examples],
        parent_S=parent_S,
        unit_S=_units(examples),
        targets_S=np.bincount(sample_T[target_N[:num_targets]], minlength=len(examples)).tolist(),
        extra=extra,
        host_S={name: extra[name].tolist() for name in extra if name.endswith("_S")},
    )


def filler(objective: Declares, channel: int = 0) -> Batch:
    """A batch that weighs nothing: two tokens, no target, only padding, sample id -1.

    A rank with no work left runs it, because sharded engines need as many forward and backward
    passes on every rank. What the objective declares is there: 0, and -1 of an index.
    """
    nothing = Example(
        input_ids_L=np.zeros(2, np.int32),
        weight_L=np.zeros(2, np.float32),
        channel=channel,
        sample_id=-1,
    )
    batch = collate([nothing])
    for declared in objective.extra:
        size = len(batch.labels_N) if declared.name.endswith("_N") else 1
        value, dtype = (-1, torch.int64) if declared.index else (0, torch.float32)
        batch.extra[declared.name] = torch.full((size,), value, dtype=dtype)
        if declared.name.endswith("_S"):
            batch.host_S[declared.name] = [value] * size
    return batch


def _parents(examples: Sequence[Example]) -> list[int]:
    """Of each sample, the index of the one that it follows; -1: none."""
    newest: dict[int, int] = {}
    parent_S = []
    for index, example in enumerate(examples):
        parent = -1 if example.parent is None else newest.get(example.parent)
        if parent is None:
            raise DataError(
                f"sample {example.sample_id} follows sample {example.parent}, which does not "
                "stand before it in its row",
                where="prepared data",
                fix="plan the packs in units that keep a prompt and its answers together",
            )
        parent_S.append(parent)
        newest[example.sample_id] = index
    return parent_S


def _units(examples: Sequence[Example]) -> list[int]:
    """The unit of each sample, numbered in the row: it may hold one unit twice."""
    numbers: list[int] = []
    unit: int | None = None
    seen: set[int] = set()
    for example in examples:
        if unit is None or example.unit != unit or example.sample_id in seen:
            numbers.append(numbers[-1] + 1 if numbers else 0)
            unit, seen = example.unit, set()
        else:
            numbers.append(numbers[-1])
        seen.add(example.sample_id)
    return numbers


def _before(lengths: Sequence[int], parent_S: Sequence[int]) -> list[int]:
    """Tokens that each sample follows: those of its parent, and of the parent's parents."""
    before: list[int] = []
    for parent in parent_S:
        before.append(0 if parent < 0 else before[parent] + lengths[parent])
    return before


def _extra(
    examples: Sequence[Example], target_N: npt.NDArray[np.intp], num_targets: int
) -> dict[str, torch.Tensor]:
    """Fields of the samples: at the targets, 0 in padding; or one number per sample."""
    names = set().union(*(example.extra for example in examples))
    found = {}
    for name in sorted(names):
        for example in examples:
            if name not in example.extra:
                raise DataError(
                    f"sample {example.sample_id} has no {name}, which others of its row have",
                    where="prepared data",
                )
        values = [np.asarray(example.extra[name]) for example in examples]
        if name.endswith("_L"):
            name = f"{name.removesuffix('_L')}_N"
            column = np.concatenate(values)[target_N]
            column[num_targets:] = 0
        else:
            column = np.stack(values)
        whole = np.issubdtype(column.dtype, np.integer)
        found[name] = torch.from_numpy(column.astype(np.int64 if whole else np.float32))
    return found


def _pad(target_N: npt.NDArray[np.intp], value: int) -> npt.NDArray[np.intp]:
    num = max(1, -(-len(target_N) // TARGET_MULTIPLE)) * TARGET_MULTIPLE
    return np.pad(target_N, (0, num - len(target_N)), constant_values=value)


def _out_of_range(examples: Sequence[Example], vocab_size: int) -> DataError:
    for example in examples:
        ids_L = example.input_ids_L
        wrong = np.flatnonzero((ids_L < 0) | (ids_L >= vocab_size))
        if len(wrong):
            break
    return DataError(
        f"sample {example.sample_id} holds token {ids_L[wrong[0]]} at place {wrong[0]}, outside "
        f"[0, {vocab_size}), the vocabulary of the model",
        where="prepared data",
        fix="prepare the data again, with the tokenizer that belongs to the model",
    )
