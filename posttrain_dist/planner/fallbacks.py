"""`tuning=auto engine=auto`: the first fallback that fits, and why not those before it.

Within a fallback the micro-batch and the layers that recompute are those that train fastest among
what fits. Recomputing a layer saves about the same for each layer, so that the fewest layers that
are enough are found by a straight line between none and all, and then checked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator

from posttrain_dist.config import AutoEngine, AutoTuning, RunConfig, complete
from posttrain_dist.errors import ConfigError, PosttrainError, SeveralErrors
from posttrain_dist.planner.data_facts import DataFacts
from posttrain_dist.planner.job import Machine
from posttrain_dist.planner.make_job import count_workers, make_job
from posttrain_dist.planner.make_plan import make_plan
from posttrain_dist.planner.methods import (
    MICRO_BATCH,
    Method,
    checkpointing_words,
    chooses_checkpointing,
    is_free,
    methods,
)
from posttrain_dist.planner.overriding import with_words
from posttrain_dist.planner.plan import Choice, Plan, Tried

FASTER = 1.005  # by less than this factor a setting is no reason to take more memory
LESS = 0.95  # of what ran out of memory: what a plan must promise to be worth another start
_STEPS = 8  # of the search for the fewest layers, each beside the last


def is_auto(config: RunConfig) -> bool:
    """Whether tuning or engine is left to the planner."""
    return isinstance(config.tuning, AutoTuning) or isinstance(config.engine, AutoEngine)


def choose(
    config: RunConfig,
    machine: Machine,
    facts: DataFacts | None = None,
    typed: Collection[str] = (),
) -> Choice:
    """The first fallback that fits; of a config that names tuning and engine, the run as it is.

    Args:
        config: with every slot filled.
        typed: keys that were typed, at their defaults too: these settings stay.

    Raises:
        ConfigError: none fits, or none can be planned.
        ModelError, SeveralErrors: the model cannot be planned.
    """
    tried = try_all(config, machine, facts, typed)
    chosen = next((each for each in tried if each.plan is not None and each.plan.fits), None)
    if chosen is None:
        raise nothing_fits(tried)
    return Choice(tried, chosen)


def try_all(
    config: RunConfig,
    machine: Machine,
    facts: DataFacts | None = None,
    typed: Collection[str] = (),
) -> tuple[Tried, ...]:
    """Every fallback of a config, planned. Arguments and errors as for `choose`."""
    search = _Search(config, machine, facts, typed)
    if is_auto(config):
        return tuple(search.method(each) for each in methods(config, machine))
    (given,) = methods(config, machine)
    return (Tried(given.name, search.plan(())),)


def with_choice(config: RunConfig, tried: Tried) -> RunConfig:
    """The config that a fallback trains; also of a config that is an earlier choice of the same."""
    return with_words(config, tried.plan.overrides) if tried.plan is not None else config


def following(choice: Choice) -> Choice | None:
    """What to start after the chosen one ran out of memory; None: nothing that promises less.

    The same method with the least memory comes first, where that is clearly less; then the next
    fallbacks, each as it was planned or with the least memory that it can do with.
    """
    assert choice.chosen.plan is not None
    most = LESS * choice.chosen.plan.device.total_bytes
    names = [each.name for each in choice.tried]
    for each in choice.tried[names.index(choice.chosen.name) :]:
        for plan in (each.plan, each.leanest):
            if plan is not None and plan.fits and plan.device.total_bytes <= most:
                return Choice(choice.tried, dataclasses.replace(each, plan=plan))
    return None


def nearest(
    config: RunConfig, machine: Machine, facts: DataFacts | None = None
) -> Tried | None:
    """What fits instead of a run that does not: its own method with other settings, or the next.

    Args:
        config: with tuning and engine named.
    """
    search = _Search(config, machine, facts, ())
    for candidate in _instead(config):
        for method in methods(candidate, machine):
            found = dataclasses.replace(search, config=candidate).method(method)
            if found.plan is not None and found.plan.fits:
                return found
    return None


def _instead(config: RunConfig) -> Iterator[RunConfig]:
    yield config
    yield dataclasses.replace(config, engine=AutoEngine())
    yield dataclasses.replace(config, tuning=AutoTuning(), engine=AutoEngine())


def nothing_fits(tried: tuple[Tried, ...]) -> ConfigError:
    """The error that names the smallest miss of all, and what can be done about it."""
    planned = [(each, each.plan) for each in tried if each.plan is not None]
    if not planned:
        refused = "; ".join(f"{each.name}: {each.refused}" for each in tried)
        return ConfigError(f"nothing can be planned: {refused}", where="tuning", fix="name one")
    each, plan = max(planned, key=lambda pair: _spare(pair[1]))
    return ConfigError(
        f"no fallback fits; nearest is {each.name}, {miss(plan)}",
        where="tuning",
        fix="posttrain plan --largest data.max_length says how long rows may be, --fewest gpus "
        "how many GPUs it takes, --all shows every fallback",
    )


def miss(plan: Plan) -> str:
    """What a plan lacks, and on which item most is."""
    lacks = f"{-_spare(plan) / 2**30:.2f} GiB are missing"
    where = "on each GPU" if plan.spare_bytes < 0 else "on a host"
    if not plan.on_gpu:
        where = "for each process"
    return f"{lacks} {where}, which has {_room(plan) / 2**30:.4g} GiB; most is {plan.largest_item}"


def _spare(plan: Plan) -> int:
    """Where it is tightest."""
    return min(plan.spare_bytes, plan.host_spare_bytes)


def _room(plan: Plan) -> int:
    return plan.capacity_bytes if plan.spare_bytes < 0 else plan.host_capacity_bytes


# ------------------------------------------------------------------------------------ the search


@dataclasses.dataclass(frozen=True, slots=True)
class _Search:
    """Plans of one config with other words."""

    config: RunConfig
    machine: Machine
    facts: DataFacts | None
    typed: Collection[str]

    def plan(self, words: tuple[str, ...]) -> Plan:
        """Raises what is wrong with the config that the words make."""
        config = complete(with_words(self.config, words))
        return make_plan(make_job(config, self.machine, self.facts), words)

    def method(self, method: Method) -> Tried:
        """The fastest way of a fallback that fits; else the one that misses least."""
        found, refused = list[Tried](), ""
        for way in method.ways:
            try:
                found.append(self._way(method.name, way))
            except (ConfigError, SeveralErrors) as error:
                refused = _why(error)
        if not found:
            return Tried(method.name, None, refused)
        fit = [each for each in found if each.plan is not None and each.plan.fits]
        best = (fit or found)[0]
        for each in (fit or found)[1:]:
            if self._is_better(each, best, fits=bool(fit)):
                best = each
        return best

    def _is_better(self, each: Tried, best: Tried, *, fits: bool) -> bool:
        assert each.plan is not None and best.plan is not None
        if fits:
            return each.plan.speed.tokens_per_s > FASTER * best.plan.speed.tokens_per_s
        return _spare(each.plan) > _spare(best.plan)

    def _way(self, name: str, words: tuple[str, ...]) -> Tried:
        config = with_words(self.config, words)
        workers = count_workers(config, self.machine)[0]
        packs = math.ceil(config.train.batch_size / workers)
        chooses = chooses_checkpointing(config, self.typed)
        sizes = [1]
        if not is_free(config, MICRO_BATCH, self.typed):
            sizes = [config.train.micro_batch_size]
        elif packs > 1:
            sizes = [*(2**i for i in range((packs - 1).bit_length())), packs]
        everything = checkpointing_words(1, 1) if chooses else ()
        leanest = self.plan((*words, f"{MICRO_BATCH}={sizes[0]}", *everything))
        if not leanest.fits:
            return Tried(name, leanest, leanest=leanest)
        best = leanest
        for size in sizes:
            sized = (*words, f"{MICRO_BATCH}={size}")
            found = self._fewest_layers(sized) if chooses else self.plan(sized)
            if found is None or not found.fits:
                break
            if found.speed.tokens_per_s > FASTER * best.speed.tokens_per_s:
                best = found
        return Tried(name, best, leanest=leanest)

    def _fewest_layers(self, words: tuple[str, ...]) -> Plan | None:
        """The plan in which the fewest layers recompute; None: not even all of them are enough."""
        none = self.plan((*words, *checkpointing_words(0, 1)))
        if none.fits:
            return none
        full = self.plan((*words, *checkpointing_words(1, 1)))
        if not full.fits:
            return None
        layers = self._num_layers
        saved = none.device.total_bytes - full.device.total_bytes
        first = math.ceil(layers * -none.spare_bytes / saved) if saved > 0 else layers
        for recomputed in range(max(1, first), min(layers, first + _STEPS)):
            some = self.plan((*words, *checkpointing_words(recomputed, layers)))
            if some.fits:
                return some
        return full
