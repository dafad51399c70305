"""What the loop takes batches from, and the thread that makes those of the next step."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import torch

    from posttrain_dist.data.packs.heaviest import RowMemory
    from posttrain_dist.flow import Batch


class Source(Protocol):
    """The batches of this rank, step by step."""

    @property
    def prefetchable(self) -> bool:
        """Whether a step may be made before the steps before it are taken.

        A source that needs the current weights, as rollouts do, says no.
        """

    def step(self, k: int) -> list[Batch]:
        """The micro-batches of update `k`, from 1; as many on every rank."""

    def sample_ids(self, k: int) -> list[int]:
        """Ids of the samples of step `k` over all ranks."""


class RunSource(Source, Protocol):
    """What a run takes its batches from, beside those of the steps."""

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's share of all samples, each once over the ranks; as many on every rank."""

    def heaviest(self, steps: int, memory: RowMemory | None = None) -> list[list[Batch]]:
        """Updates that take the most memory of a run of `steps`; see `PackedSource`."""


class Prefetcher:
    """The same batches as those of `source`, on `device`; a context, that ends its thread.

    A prefetchable source is a function of the step alone: what is made ahead is never stale, and
    a resumed run needs nothing of it. An error in making a step is raised when that step is asked
    for. Of any other source a step is made when it is asked for, by the thread that asks.

    Args:
        last: the last step that will be asked for.
    """

    prefetchable = False  # it is done already

    def __init__(self, source: Source, device: torch.device, last: int) -> None:
        self._source, self._device, self._last = source, device, last
        self._thread: ThreadPoolExecutor | None = None
        if source.prefetchable:
            self._thread = ThreadPoolExecutor(
                max_workers=1, thread_name_prefix="batches", initializer=self._enter
            )
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def step(self, k: int) -> list[Batch]:
        """The batches of step `k`; those of the next are begun if they may be."""
        if self._thread is None:
            return self._make(k)
        if self._next is None or self._next[0] != k:
            self._next = (k, self._thread.submit(self._make, k))
        batches = self._next[1].result()
        if k < self._last:
            self._next = (k + 1, self._thread.submit(self._make, k + 1))
        return batches

    def sample_ids(self, k: int) -> list[int]:
        """As the source gives them."""
        return self._source.sample_ids(k)

    def _make(self, k: int) -> list[Batch]:
        return [batch.to(self._device) for batch in self._source.step(k)]

    def _enter(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.set_device(self._device)  # each thread has its own

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
