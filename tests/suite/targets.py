"""What samples train on, whatever they share: each target behind all that stands before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from posttrain_dist.flow import Example


def targets(samples: Sequence[Example]) -> Counter[tuple[int, ...]]:
    """Tokens before and with each target -> its weight, added up.

    Args:
        samples: whose `parent` is a place among them.
    """
    found: Counter[tuple[int, ...]] = Counter()
    for each in samples:
        before: tuple[int, ...] = ()
        above = each.parent
        while above is not None:
            before = (*samples[above].input_ids_L.tolist(), *before)
            above = samples[above].parent
        ids = (*before, *each.input_ids_L.tolist())
        for place in np.flatnonzero(each.weight_L):
            if len(before) + place:  # nothing stands before the first token to predict it from
                found[ids[: len(before) + int(place) + 1]] += float(each.weight_L[place])
    return found
