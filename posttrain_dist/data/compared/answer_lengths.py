"""What is compared in a split, and how long the better and the worse answers are.

Letters: S samples, C channels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.prepared.arrays import Examples

Ints = npt.NDArray[np.int64]


def compared(examples: Examples, num_channels: int) -> dict[str, Ints]:
    """Counts of each channel, int64 [C], by the names of `Counts`; empty without answers.

    Every two answers of a unit that are worth different are a comparison. A label of 1 makes a
    single answer a better one, 0 a worse one.
    """
    role_S, value_S = examples.extra("role_S"), examples.extra("value_S")
    if role_S is None or value_S is None:
        return {}
    unit_S = np.repeat(np.arange(len(examples.units)), np.diff(examples.units.first))
    answers = np.flatnonzero(role_S == 0)
    unit_A, value_A = unit_S[answers], value_S[answers]
    length_A, channel_A = examples.lengths[answers], examples.channel_ids[answers]
    better: list[Ints] = []
    worse: list[Ints] = []
    apart = 1
    while True:  # each answer with the one that stands `apart` behind it
        ahead = np.arange(len(answers) - apart) if apart < len(answers) else np.arange(0)
        same = ahead[unit_A[ahead] == unit_A[ahead + apart]]
        if not len(same):
            break
        higher = value_A[same] > value_A[same + apart]
        lower = value_A[same] < value_A[same + apart]
        better += [same[higher], same[lower] + apart]
        worse += [same[higher] + apart, same[lower]]
        apart += 1
    none = np.empty(0, np.int64)
    of_better, of_worse = np.concatenate([none, *better]), np.concatenate([none, *worse])
    comparisons = np.bincount(channel_A[of_better], minlength=num_channels)
    if apart == 1 and set(np.unique(value_A).tolist()) <= {0.0, 1.0}:  # labels
        of_better, of_worse = np.flatnonzero(value_A == 1), np.flatnonzero(value_A == 0)

    def tokens(chosen: Ints) -> Ints:
        summed = np.bincount(channel_A[chosen], length_A[chosen], minlength=num_channels)
        return summed.astype(np.int64)

    return {
        "comparisons": comparisons,
        "better": np.bincount(channel_A[of_better], minlength=num_channels),
        "better_tokens": tokens(of_better),
        "worse": np.bincount(channel_A[of_worse], minlength=num_channels),
        "worse_tokens": tokens(of_worse),
    }
