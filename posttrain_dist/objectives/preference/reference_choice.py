"""Which model's log-probabilities answers are measured against."""

from __future__ import annotations

from enum import Enum


class Reference(Enum):
    """Where `ref_logprob_N`, log p of a model that is not trained, comes from."""

    auto = "auto"  # adapter_off where an adapter is trained, else precomputed
    precomputed = "precomputed"  # by one pass over the data before step 1, kept for later runs
    adapter_off = "adapter_off"  # the base model, under the adapter that is trained
    frozen = "frozen"  # a second copy of the model, in memory all the time
