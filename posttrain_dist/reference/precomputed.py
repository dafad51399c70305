"""The pass before step 1: the reference's log-probabilities of every sample that a run meets.

Samples are taken in parts, each part spread over the ranks as an evaluation is; rank 0 writes a
part when it is whole. What is there already, of a pass that was killed or of another run, is not
computed again, whatever the layout was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from posttrain_dist import dist
from posttrain_dist.data.packs.loader import PackedSource
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.flow import Batch
from posttrain_dist.reference.kept_log_probs import StoredLogProbs
from posttrain_dist.reference.log_probs import Score

Ints = npt.NDArray[np.int64]
_EVERY_S = 30.0  # between lines of progress


def complete(
    stored: StoredLogProbs,
    examples: Examples,
    score: Callable[[], Score],
    make_source: Callable[[Examples], PackedSource],
    device: torch.device,
    *,
    part_tokens: int,
    say: Callable[[str], None],
) -> None:
    """Compute what `stored` lacks of `examples`; collective.

    Args:
        score: makes the reference, where anything is to be computed.
        make_source: batches of some samples, in their order, each once over the ranks.
        part_tokens: of a part: what a kill costs, and what the ranks share.
        say: takes lines of progress, on rank 0.
    """
    missing = dist.from_main(lambda: examples.places[~stored.done()[examples.places]])
    if not len(missing):
        return
    rest = examples.subset(missing)
    progress = _Progress(rest, say)
    reference = score()
    for part in _parts(rest, part_tokens):
        subset = rest.subset(part)
        found = _values(subset, make_source(subset), reference, device)
        gathered = dist.gather(found)
        dist.on_main(lambda subset=subset, gathered=gathered: _write(stored, subset, gathered))  # type: ignore[misc]
        progress.add(subset)
    progress.end()


def _parts(examples: Examples, part_tokens: int) -> Iterator[Ints]:
    """Places of the samples of whole units, `part_tokens` of them or the rest."""
    units = examples.units
    ends = np.cumsum(units.lengths, dtype=np.int64)
    first = 0
    while first < len(units):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + part_tokens, side="right")))
        yield examples.places[units.first[first] : units.first[last]]
        first = last


def _values(
    subset: Examples, source: PackedSource, score: Score, device: torch.device
) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Of this rank's samples: where each target stands in the array of all tokens, its value."""
    number = {int(sample_id): i for i, sample_id in enumerate(subset.sample_ids)}
    assert len(number) == len(subset), "sample ids are unique"
    starts = subset.starts
    tokens: list[Ints] = [np.empty(0, np.int64)]
    values = [np.empty(0, np.float32)]
    for batch in source.eval_batches():
        found_N = score(batch.to(device))[: batch.num_targets].cpu().numpy()
        sample_N = batch.sample_N[: batch.num_targets].numpy()
        for sample, sample_id in enumerate(batch.sample_id_S):
            if sample_id < 0:
                continue
            i = number[sample_id]
            own = found_N[sample_N == sample]
            places = starts[i] + _target_places(subset, i, batch, sample)
            assert len(own) == len(places), "a value for each target"
            tokens.append(places)
            values.append(own)
    return np.concatenate(tokens), np.concatenate(values)


def _target_places(subset: Examples, i: int, batch: Batch, sample: int) -> Ints:
    places: Ints = np.flatnonzero(subset[i].weight_L)
    # The first token of a root is nobody's target.
    return places[places > 0] if batch.parent_S[sample] < 0 else places


def _write(
    stored: StoredLogProbs,
    subset: Examples,
    gathered: list[tuple[Ints, npt.NDArray[np.float32]]],
) -> None:
    tokens, values = (np.concatenate(each) for each in zip(*gathered, strict=True))
    stored.write(tokens, values, subset.places)


class _Progress:
    """Lines about a pass: at its beginning, now and then, at its end."""

    def __init__(self, examples: Examples, say: Callable[[str], None]) -> None:
        self._say, self._total = say, int(examples.lengths.sum(dtype=np.int64))
        self._done, self._began = 0, time.monotonic()
        self._last = self._began
        self._tell(
            f"log-probabilities of the reference: {len(examples.units):,} rows, "
            f"{self._total:,} tokens"
        )

    def add(self, part: Examples) -> None:
        """A part is written."""
        self._done += int(part.lengths.sum(dtype=np.int64))
        now = time.monotonic()
        if now - self._last < _EVERY_S or self._done >= self._total:
            return
        self._last = now
        rate = self._done / (now - self._began)
        self._tell(
            f"log-probabilities of the reference: {self._done:,} of {self._total:,} tokens, "
            f"{(self._total - self._done) / rate:.0f} s to go"
        )

    def end(self) -> None:
        """All of them are."""
        seconds = time.monotonic() - self._began
        self._tell(f"log-probabilities of the reference: done in {seconds:.1f} s")

    def _tell(self, line: str) -> None:
        if dist.rank() == 0:
            self._say(line)
