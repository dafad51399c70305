"""Batches whose log-probabilities come from a model as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from posttrain_dist.data.packs.heaviest import RowMemory
from posttrain_dist.data.packs.prefetch import Prefetcher, RunSource
from posttrain_dist.flow import Batch
from posttrain_dist.reference.log_probs import Score


class FilledSource:
    """The batches of `source` on the device, with fields that models fill.

    Every rank fills as many batches, fillers too: a sharded model is run by all of them at once.
    What `source` makes is made ahead; what depends on the current weights is not.

    Args:
        fills: name of the field -> what computes it.
        last: the last step that will be asked for.
    """

    prefetchable = False

    def __init__(
        self, source: RunSource, fills: Mapping[str, Score], device: torch.device, last: int
    ) -> None:
        self._source, self._fills, self._device = source, fills, device
        self._prefetcher = Prefetcher(source, device, last)

    def step(self, k: int) -> list[Batch]:
        """The micro-batches of update `k`, filled by the weights of now."""
        return [self._filled(batch) for batch in self._prefetcher.step(k)]

    def sample_ids(self, k: int) -> list[int]:
        """As the source gives them."""
        return self._source.sample_ids(k)

    def eval_batches(self) -> Iterator[Batch]:
        """Those of the source, filled one by one."""
        for batch in self._source.eval_batches():
            yield self._filled(batch.to(self._device))

    def heaviest(self, steps: int, memory: RowMemory | None = None) -> list[list[Batch]]:
        """Those of the source, filled: the memory that filling takes is taken."""
        return [
            [self._filled(batch.to(self._device)) for batch in batches]
            for batches in self._source.heaviest(steps, memory)
        ]

    def close(self) -> None:
        """End the thread that makes batches ahead."""
        self._prefetcher.__exit__(None, None, None)

    def _filled(self, batch: Batch) -> Batch:
        for name, score in self._fills.items():
            batch.extra[name] = score(batch)
        return batch
