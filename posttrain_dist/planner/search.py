"""The settings of a fallback: what trains fastest among what fits.

Recomputing a layer saves about as much as recomputing any other, so the fewest layers that are
enough are found on a straight line: between none and all, then between none and what was found.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from posttrain_dist.config import RunConfig, complete
from posttrain_dist.errors import PosttrainError, SeveralErrors
from posttrain_dist.planner.job import DataFacts, Job, Machine
from posttrain_dist.planner.make_job import count_workers, make_job, read_network
from posttrain_dist.planner.make_plan import make_plan, may_fit
from posttrain_dist.planner.methods import (
    MICRO_BATCH,
    Method,
    checkpointing_words,
    chooses_checkpointing,
    is_free,
)
from posttrain_dist.planner.overriding import with_words
from posttrain_dist.planner.plan import Plan, Tried

FASTER = 1.005  # by less than this factor a setting is no reason to take more memory
NONE, ALL = checkpointing_words(0, 1), checkpointing_words(1, 1)
_NEAR = 0.05  # of all layers: so near to the fewest is near enough


@dataclass(frozen=True, slots=True)
class Search:
    """Plans of one config with other words.

    Args:
        config: with every slot filled.
        facts: of the data; None: not known.
        typed: keys whose settings stay, though they stand at their defaults.
    """

    config: RunConfig
    machine: Machine
    facts: DataFacts | None = None
    typed: Collection[str] = ()
    _made: dict[tuple[str, ...], Plan] = field(default_factory=dict, compare=False)

    def with_words(self, words: tuple[str, ...]) -> Search:
        """The same of a config that the words change."""
        config = with_words(self.config, words)
        return Search(config, self.machine, self.facts, self.typed)

    def plan(self, words: tuple[str, ...]) -> Plan:
        """The plan of the config with `words`.

        Raises:
            PosttrainError: what is wrong with such a config, or with the model.
        """
        if words not in self._made:
            self._made[words] = make_plan(self._job(words), words)
        return self._made[words]

    def fastest(self, method: Method) -> Tried:
        """The fastest plan of a method that fits; else the one that lacks least."""
        return self._of_ways(method, self._fastest)

    def leanest(self, method: Method) -> Tried:
        """A plan of a method that takes little memory: if any of its plans fits, this one does."""
        return self._of_ways(method, self._leanest)

    def fits(self, method: Method) -> bool:
        """Whether a method fits with what takes least memory."""
        for words in self._possible(method):
            with contextlib.suppress(PosttrainError):
                if self._leanest(words).fits:
                    return True
        return False

    def _job(self, words: tuple[str, ...]) -> Job:
        config = complete(with_words(self.config, words))
        return make_job(config, self.machine, self.facts)

    def _possible(self, method: Method) -> tuple[tuple[str, ...], ...]:
        """The ways of a method but those that cannot fit, which is seen without a plan."""
        found = []
        for words in method.ways:
            with contextlib.suppress(PosttrainError):
                if may_fit(self._job(self._leanest_words(words))):
                    found.append(words)
        return tuple(found)

    def _of_ways(self, method: Method, planned: Callable[[tuple[str, ...]], Plan]) -> Tried:
        if len(method.ways) > 1:
            found = self._best(method.name, self._possible(method), planned)
            if found.plan is not None and found.plan.fits:
                return found
        return self._best(method.name, method.ways, planned)

    def _best(
        self,
        name: str,
        ways: tuple[tuple[str, ...], ...],
        planned: Callable[[tuple[str, ...]], Plan],
    ) -> Tried:
        best: Tried | None = None
        refused = ""
        for words in ways:
            try:
                plan, leanest = planned(words), self._leanest(words)
            except PosttrainError as error:
                refused = _why(error)
                continue
            if best is None or best.plan is None or _is_better(plan, best.plan):
                best = Tried(name, plan, leanest=leanest)
            if plan.fits and set(NONE) <= set(plan.overrides):
                break  # to shard more would only send more
        return best or Tried(name, None, refused)

    def _leanest(self, words: tuple[str, ...]) -> Plan:
        """Of the shortest rows; where these do not fit, also of all packs at once.

        Those add up no gradients, which so are never there beside all activations.
        """
        short, whole = (self._leanest_words(words, which) for which in (0, -1))
        plan = self.plan(short)
        if plan.fits or whole == short or not may_fit(self._job(whole)):
            return plan
        at_once = self.plan(whole)
        return at_once if _is_better(at_once, plan) else plan

    def _leanest_words(self, words: tuple[str, ...], which: int = 0) -> tuple[str, ...]:
        """Args: which: of the micro-batches that are tried."""
        size = self._micro_batches(words)[which]
        return (*words, *size, *(ALL if self._chooses_layers else ()))

    def _fastest(self, words: tuple[str, ...]) -> Plan:
        """Of rows that get longer as long as that helps, each with the fewest layers."""
        best = leanest = self._leanest(words)
        if not leanest.fits:
            return leanest
        sizes = self._micro_batches(words)
        if not set(sizes[0]) <= set(leanest.overrides):
            sizes = sizes[-1:]
        for number, size in enumerate(sizes):
            sized = (*words, *size)
            found = self._fewest_layers(sized) if self._chooses_layers else self.plan(sized)
            faster = found.speed.tokens_per_s / best.speed.tokens_per_s
            if not found.fits and number == len(sizes) - 2:
                continue  # all packs at once may fit
            if not found.fits or (number and faster <= FASTER):
                break
            best = found if faster > FASTER else best
        return best

    def _fewest_layers(self, words: tuple[str, ...]) -> Plan:
        """The plan in which few layers recompute; all of them, if not even that fits.

        Each layer saves as much as the one before or, where something else becomes the fullest,
        nothing. So the line from none to any number that fits ends at a number that fits too.
        """
        none = self.plan((*words, *NONE))
        if none.fits:
            return none
        best = self.plan((*words, *ALL))
        most = layers = len(read_network(self.config).layers)
        while best.fits and most > 1:
            by_each = (none.device.total_bytes - best.device.total_bytes) / most
            enough = math.ceil(-none.spare_bytes / by_each) if by_each > 0 else most
            fewer = enough if enough < most else most - math.ceil(_NEAR * layers)
            if fewer < 1:
                break
            some = self.plan((*words, *checkpointing_words(fewer, layers)))
            if not some.fits:
                break
            best, most = some, fewer
            if some.device.total_bytes > none.device.total_bytes - (fewer + 0.5) * by_each:
                break  # it lies on the line: each layer saves
        return best

    def _micro_batches(self, words: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Words of the sizes that are tried, ascending: powers of two, and all packs."""
        config = with_words(self.config, words)
        if not is_free(config, MICRO_BATCH, self.typed):
            return [()]
        packs = math.ceil(config.train.batch_size / count_workers(config, self.machine)[0])
        sizes = [2**power for power in range(packs.bit_length()) if 2**power < packs]
        return [(f"{MICRO_BATCH}={size}",) for size in (*sizes, packs)]

    @property
    def _chooses_layers(self) -> bool:
        return chooses_checkpointing(self.config, self.typed)


def _is_better(plan: Plan, than: Plan | None) -> bool:
    if than is None or plan.fits != than.fits:
        return plan.fits
    if plan.fits:
        return plan.speed.tokens_per_s > FASTER * than.speed.tokens_per_s
    return spare_bytes(plan) > spare_bytes(than)


def spare_bytes(plan: Plan) -> int:
    """Of a GPU or a host, where it is tightest; negative: so much is missing."""
    return min(plan.spare_bytes, plan.host_spare_bytes)


def _why(error: PosttrainError) -> str:
    problems = error.problems if isinstance(error, SeveralErrors) else [error]
    return "; ".join(f"{each.where} {each.what}" for each in problems)
