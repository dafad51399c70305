"""Which samples an epoch draws from which source, from (seed, phase, epoch, draws before).

    weights -> shares -> amount of each source in an epoch -> passes over its rows

A phase is the part of a run in which weights stay the same. An amount counts rows or supervised
tokens and need not be whole: what rounding takes from one epoch it gives to the next.

A source's rows stand in one line of passes for the whole run, each a shuffle of all its rows, and
an epoch goes on where the one before ended. A phase that is cut short leaves an epoch unfinished.
The next phase begins with the rest of it, by its own weights, and goes on in the line, of which
the first n places of a row that came n times are left out. So, counted since the run began,

- with what an epoch draws, a row that is drawn came at most once more than any other row of its
  source (an epoch's packs are in random order: this holds when it ends);
- where an epoch of the run ends, each source that it drew from gave what all phases asked of it,
  to half a row (of tokens: to its last row), if no phase before had already taken more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from posttrain_dist.data import DataConfig, MixBy
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.errors import ConfigError, DataError

Ints = npt.NDArray[np.signedinteger]

_PASS = 1  # keeps the shuffles of passes apart from those of epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """What is asked of one source."""

    name: str
    weight: float = 1.0  # its share is weight / sum of weights
    max_passes: float | None = None  # over its rows in an epoch, at most
    schedule: Mapping[int, float] = field(default_factory=dict)  # from this step on: weight

    def weight_at(self, step: int) -> float:
        """The weight from `step` on, until the next key of the schedule."""
        begun = [key for key in self.schedule if key <= step]
        return self.schedule[max(begun)] if begun else self.weight


@dataclass(frozen=True, slots=True)
class MixtureState:
    """What a run took before a phase."""

    epochs: float = 0.0  # the last one in part, if a phase was cut short
    tokens: int = 0  # that the model read
    # Times that each sample was drawn.
    draw_counts: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    # Rows, or supervised tokens, of each source that were asked for and did not come.
    deficit: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True, slots=True)
class SourceShare:
    """One source in the epochs of one phase."""

    name: str
    size: int  # rows, or supervised tokens, that it has
    target: float  # share of an epoch that its weight asks for
    amount: float  # rows, or supervised tokens, of an epoch
    share: float  # amount / sum of amounts
    capped: bool  # `max_passes` keeps it below the target

    @property
    def passes(self) -> float:
        """Times that each of its rows is drawn in an epoch."""
        return self.amount / self.size if self.size else 0.0


class Mixture:
    """The draws of a run from several sources.

    An epoch is as large as all sources together; where sources are capped and no other is left to
    take their share, it is smaller.

    Args:
        sources: source of each sample, an index into `specs`.
        supervised: supervised tokens of each sample.
        specs: one per source.
        by: what weights are shares of.
        seed: of the run.

    Raises:
        ConfigError: weights or caps that mean nothing.
        DataError: a source with a weight has no sample.
    """

    def __init__(
        self, sources: Ints, supervised: Ints, specs: Sequence[SourceSpec], by: MixBy, seed: int
    ) -> None:
        _check(specs)
        self._seed, self._sources = seed, sources
        self._rows = [np.flatnonzero(sources == s).astype(np.int32) for s in range(len(specs))]
        # A row without a target still takes a place in the line.
        measure = np.maximum(supervised, 1) if by is MixBy.tokens else None
        self._measure = None if measure is None else measure.astype(np.int64)
        sizes = [
            len(rows) if self._measure is None else int(self._measure[rows].sum())
            for rows in self._rows
        ]
        starts = sorted({1} | {max(1, step) for spec in specs for step in spec.schedule})
        self.phase_starts = starts  # first step of each phase
        self.phases = [_source_shares(specs, sizes, step) for step in starts]
        self.start = MixtureState(0.0, 0, np.zeros(len(sources), np.int32), np.zeros(len(specs)))

    def draw(self, phase: int, epoch: int, before: MixtureState | None = None) -> Ints:
        """Samples of one epoch of one phase, in no order that matters.

        Args:
            phase: from 0.
            epoch: of the phase, from 0, which is the rest of one where `before` ends inside it.
            before: what was drawn before the phase; None: nothing.
        """
        before = before or self.start
        drawn: list[Ints] = [np.zeros(0, np.int32)]
        for s, share in enumerate(self.phases[phase]):
            if share.amount:
                begin, end = _bounds(share.amount, float(before.deficit[s]), before.epochs, epoch)
                drawn += self._draw(s, begin, end, before.draw_counts)
        result: Ints = np.concatenate(drawn)
        return result

    def names(self) -> list[str]:
        """The sources, by number."""
        return [share.name for share in self.phases[0]]

    def amounts(self, drawn: Ints) -> npt.NDArray[np.float64]:
        """Rows, or supervised tokens, of each source in some samples."""
        weights = None if self._measure is None else self._measure[drawn]
        counted: npt.NDArray[np.float64] = np.bincount(
            self._sources[drawn], weights, len(self._rows)
        ).astype(np.float64)
        return counted

    def group_shares(self, phase: int, group: Ints, supervised: Ints) -> list[float]:
        """The share of supervised tokens that each group of samples has in the epochs of a phase.

        Args:
            group: of each sample, from 0.
            supervised: supervised tokens of each sample.
        """
        totals = np.zeros(int(group.max(initial=-1)) + 1)
        for rows, share in zip(self._rows, self.phases[phase], strict=True):
            counts = np.bincount(group[rows], supervised[rows], len(totals))
            totals += share.passes * counts
        shares: list[float] = (totals / max(totals.sum(), 1)).tolist()
        return shares

    def _draw(self, source: int, begin: int, end: int, draw_counts: Ints) -> list[Ints]:
        """The amounts [begin, end) of a source's line, less the places already drawn."""
        rows, counts = self._rows[source], draw_counts[self._rows[source]]
        number, last = (
            int(counts.min()),
            int(counts.max()),
        )  # pass; from `last` on: whole ones
        parts: list[Ints] = []
        at = 0  # amount before the pass
        while at < end:
            left = rows if number >= last else rows[counts <= number]
            size = len(left) if self._measure is None else int(self._measure[left].sum())
            if number >= last and at + size <= begin:  # on to the pass that holds `begin`
                number, at = number + (begin - at) // size, begin - (begin - at) % size
            first, stop = max(begin - at, 0), min(end - at, size)
            if (first, stop) == (0, size):
                parts.append(left)
            elif first < stop:
                key = np.random.SeedSequence([self._seed, source, number, _PASS])
                shuffled = np.random.Generator(np.random.Philox(key)).permutation(rows)
                if number < last:
                    shuffled = shuffled[draw_counts[shuffled] <= number]
                if self._measure is not None:  # amounts -> places, by where each row begins
                    measure = self._measure[shuffled]
                    place = np.searchsorted(np.cumsum(measure) - measure, [first, stop])
                    first, stop = place.tolist()
                parts.append(shuffled[first:stop])
            number, at = number + 1, at + size
        return parts


def _bounds(amount: float, deficit: float, before: float, epoch: int) -> tuple[int, int]:
    """What a phase that begins after `before` epochs takes of a source until an epoch and after."""
    until = (int(before) + e - before for e in (epoch, epoch + 1))
    begin, end = (max(round(deficit + epochs * amount), 0) for epochs in until)
    return begin if epoch else 0, end


def _source_shares(specs: Sequence[SourceSpec], sizes: list[int], step: int) -> list[SourceShare]:
    weights = [spec.weight_at(step) for spec in specs]
    if not sum(weights):
        raise ConfigError(
            f"every weight is 0 from step {step} on",
            where="data.sources",
            fix="give one source a weight above 0",
        )
    for spec, weight, size in zip(specs, weights, sizes, strict=True):
        if weight and not size:
            raise DataError(
                "has a weight and no row to train on",
                where=f"data.sources.{spec.name}",
                fix="add rows to it, or leave the source out",
            )
    caps = [
        math.inf if spec.max_passes is None else spec.max_passes * size
        for spec, size in zip(specs, sizes, strict=True)
    ]
    amounts = _split_by_weight(weights, caps, sum(sizes))
    total, all_weights = sum(amounts), sum(weights)
    if not any(map(round, amounts)):
        raise ConfigError("lets no row through", where="data.sources.*.max_passes", fix="raise it")
    shares = []
    for spec, weight, size, amount in zip(specs, weights, sizes, amounts, strict=True):
        capped = amount < (1 - 1e-9) * weight / all_weights * sum(sizes)
        share = SourceShare(spec.name, size, weight / all_weights, amount, amount / total, capped)
        shares.append(share)
    return shares


def _split_by_weight(weights: list[float], caps: list[float], total: float) -> list[float]:
    """Share `total` out by weight; what a cap keeps off goes to the others, by their weights."""
    amounts = [0.0] * len(weights)
    open_ = [s for s, weight in enumerate(weights) if weight]
    left = total
    while open_:
        unit = left / sum(weights[s] for s in open_)
        full = [s for s in open_ if weights[s] * unit >= caps[s]]
        for s in full or open_:
            amounts[s] = min(weights[s] * unit, caps[s])
        if not full:
            break
        left -= sum(amounts[s] for s in full)
        open_ = [s for s in open_ if s not in full]
    return amounts


def _check(specs: Sequence[SourceSpec]) -> None:
    for spec in specs:
        where = f"data.sources.{spec.name}"
        for weight in (spec.weight, *spec.schedule.values()):
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"a weight is {weight}", where=where, fix="use 0 or more")
        if spec.max_passes is not None and not spec.max_passes > 0:
            raise ConfigError(
                f"is {spec.max_passes}",
                where=f"{where}.max_passes",
                fix="use more than 0, or null for no limit",
            )


def make_mixture(data: DataConfig, seed: int, examples: Examples) -> Mixture | None:
    """What an epoch draws from which source; None where there is one source.

    Raises:
        DataError: a source with a weight has no row.
    """
    if not data.sources:
        return None
    specs = [
        SourceSpec(
            name=name,
            weight=source.weight,
            max_passes=source.max_passes,
            schedule=source.schedule,
        )
        for name, source in data.sources.items()
    ]
    units = examples.units
    return Mixture(units.sources, units.supervised, specs, data.mix_by, seed)
