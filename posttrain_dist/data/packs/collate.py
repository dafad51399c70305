"""Examples -> Batch: one packed row, labels shifted inside each sample."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from posttrain_dist.errors import DataError
from posttrain_dist.flow import Batch, Example

TARGET_MULTIPLE = 128  # of N: kernels and compiled graphs then meet few shapes


def collate(examples: Sequence[Example], vocab_size: int | None = None) -> Batch:
    """Lay samples end to end in one row.

    The hidden state of token i predicts token i + 1 of the same sample; the last token of a
    sample predicts nothing, so its position is never among `supervised_N`.

    Args:
        vocab_size: where given, every token must be below it.

    Raises:
        DataError: a token is out of range; names sample and place.
    """
    lengths = [len(example.input_ids_L) for example in examples]
    cu_seqlens_S = [0, *accumulate(lengths)]
    ids_T = np.concatenate([example.input_ids_L for example in examples]).astype(np.int64)
    if vocab_size is not None and (ids_T.min() < 0 or ids_T.max() >= vocab_size):
        raise _out_of_range(examples, vocab_size)
    weight_T = np.concatenate([example.weight_L for example in examples]).astype(np.float32)
    channel_T = np.repeat([example.channel for example in examples], lengths)
    position_T = np.arange(len(ids_T)) - np.repeat(cu_seqlens_S[:-1], lengths)
    weight_T[cu_seqlens_S[:-1]] = 0  # the first token of a sample is nobody's target
    target_N = np.flatnonzero(weight_T)
    num_targets = len(target_N)
    # Padding repeats the last target, whose loss is as finite as it is without padding.
    last = int(target_N[-1]) if num_targets else len(ids_T) - 1
    target_N = _pad(target_N, last)
    weight_N = weight_T[target_N]
    weight_N[num_targets:] = 0
    return Batch(
        input_ids_T=torch.from_numpy(ids_T),
        position_ids_T=torch.from_numpy(position_T),
        cu_seqlens_S=cu_seqlens_S,
        bounds_S=torch.tensor(cu_seqlens_S, dtype=torch.int32),
        max_seqlen=max(lengths),
        # A row of one token has no target, only padding, which must stay inside of the row.
        supervised_N=torch.from_numpy(np.maximum(target_N - 1, 0)),
        labels_N=torch.from_numpy(ids_T[target_N]),
        channel_N=torch.from_numpy(channel_T[target_N].astype(np.int64)),
        weight_N=torch.from_numpy(weight_N),
        num_targets=num_targets,
        weight_sum=float(weight_N.sum(dtype=np.float64)),
        sample_id_S=[example.sample_id for example in examples],
    )


def filler(channel: int = 0) -> Batch:
    """A batch that weighs nothing: two tokens, no target, only padding, sample id -1.

    A rank with no work left runs it, because sharded engines need as many forward and backward
    passes on every rank.
    """
    nothing = Example(
        input_ids_L=np.zeros(2, np.int32),
        weight_L=np.zeros(2, np.float32),
        channel=channel,
        sample_id=-1,
    )
    return collate([nothing])


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
