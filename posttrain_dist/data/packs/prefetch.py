"""The batches of the next step, made in a thread while this step runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import torch

    from posttrain_dist.flow import Batch


class Source(Protocol):
    """Batches of this rank, as a pure function of the step."""

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of update `step` (from 1); as many on every rank."""


class Ahead:
    """The same batches as those of `source`, on `device`; a context, that ends its thread.

    Being a function of the step alone, what is made ahead is never stale, and a resumed run needs
    nothing of it. An error in making a step is raised when that step is asked for.

    Args:
        last: the last step that will be asked for.
    """

    def __init__(self, source: Source, device: torch.device, last: int) -> None:
        self._source, self._device, self._last = source, device, last
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="batches", initializer=self._enter
        )
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def step(self, step: int) -> list[Batch]:
        """The batches of a step, and begin the next."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._thread.submit(self._make, step))
        batches = self._next[1].result()
        if step < self._last:
            self._next = (step + 1, self._thread.submit(self._make, step + 1))
        return batches

    def _make(self, step: int) -> list[Batch]:
        return [batch.to(self._device) for batch in self._source.step(step)]

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
        self._thread.shutdown(wait=True, cancel_futures=True)
