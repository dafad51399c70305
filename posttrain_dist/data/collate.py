"""Examples -> Batch: one packed row, labels shifted inside each sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from posttrain_dist.flow import Batch, Example


def collate(examples: Sequence[Example]) -> Batch:
    """Lay samples end to end in one row.

    The hidden state of token i predicts token i + 1 of the same sample; the last token of a
    sample predicts nothing, so its position is never among `supervised_N`.
    """
    lengths = [len(example.input_ids_L) for example in examples]
    cu_seqlens_S = [0, *np.cumsum(lengths).tolist()]
    ids_T = np.concatenate([example.input_ids_L for example in examples])
    weight_T = np.concatenate([example.weight_L for example in examples])
    channel_T = np.repeat([example.channel for example in examples], lengths)
    position_T = np.concatenate([np.arange(length) for length in lengths])
    weight_T[cu_seqlens_S[:-1]] = 0  # the first token of a sample is nobody's target
    target_N = np.flatnonzero(weight_T)
    return Batch(
        input_ids_T=torch.from_numpy(ids_T.astype(np.int64)),
        position_ids_T=torch.from_numpy(position_T.astype(np.int64)),
        cu_seqlens_S=cu_seqlens_S,
        supervised_N=torch.from_numpy(target_N - 1),
        labels_N=torch.from_numpy(ids_T[target_N].astype(np.int64)),
        channel_N=torch.from_numpy(channel_T[target_N].astype(np.int64)),
        weight_N=torch.from_numpy(weight_T[target_N].astype(np.float32)),
        sample_id_S=[example.sample_id for example in examples],
    )


def filler(channel: int = 0) -> Batch:
    """A batch that weighs nothing: two tokens, one target of weight 0, sample id -1.

    A rank with no work left runs it, because sharded engines need as many forward and backward
    passes on every rank.
    """
    return Batch(
        input_ids_T=torch.zeros(2, dtype=torch.int64),
        position_ids_T=torch.arange(2),
        cu_seqlens_S=[0, 2],
        supervised_N=torch.zeros(1, dtype=torch.int64),
        labels_N=torch.zeros(1, dtype=torch.int64),
        channel_N=torch.full((1,), channel, dtype=torch.int64),
        weight_N=torch.zeros(1, dtype=torch.float32),
        sample_id_S=[-1],
    )
