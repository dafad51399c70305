"""`tuning=auto engine=auto`: the first fallback that fits, and why not those before it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator

from posttrain_dist.config import AutoEngine, AutoTuning, RunConfig
from posttrain_dist.errors import ConfigError, PosttrainError
from posttrain_dist.planner.job import DataFacts, Machine
from posttrain_dist.planner.make_job import read_network
from posttrain_dist.planner.methods import MICRO_BATCH, cheaper, checkpointing_words, methods
from posttrain_dist.planner.overriding import with_words
from posttrain_dist.planner.plan import Choice, Plan, Tried
from posttrain_dist.planner.search import Search, spare_bytes

WORTH_SAYING = 1.03  # times as fast: what a warning is given for
LESS = 0.95  # of what ran out of memory: what a plan must promise to be worth another start
INVERSE = (
    "posttrain plan --largest data.max_length says how long rows may be, --fewest gpus how many "
    "GPUs it takes, --all shows every fallback"
)


def is_auto(config: RunConfig) -> bool:
    """Whether tuning or engine is left to the planner."""
    return isinstance(config.tuning, AutoTuning) or isinstance(config.engine, AutoEngine)


def choose(
    config: RunConfig,
    machine: Machine,
    facts: DataFacts | None = None,
    typed: Collection[str] = (),
    *,
    force: bool = False,
) -> Choice:
    """The first fallback that fits; of a config that names tuning and engine, the run as it is.

    Args:
        config: with every slot filled.
        facts: of the data; None: not known.
        typed: keys that were typed, at their defaults too: these settings stay.
        force: where none fits, take the one that lacks least.

    Raises:
        ConfigError: none fits and none is forced, or none can be planned.
        ModelError, SeveralErrors: the model cannot be planned.
    """
    tried = try_until_one_fits(config, machine, facts, typed)
    if not is_auto(config):
        return Choice(tried, tried[0])
    found = first_or_nearest(tried)
    if found.plan is None or not (found.plan.fits or force):
        raise nothing_fits(tried)
    if not found.plan.fits:
        return Choice(tried, found)
    search = Search(config, machine, facts, typed)
    after = methods(config, machine)[len(tried) :]
    return Choice((*tried, *(search.leanest(method) for method in after)), tried[-1])


def first_or_nearest(tried: tuple[Tried, ...]) -> Tried:
    """The first that fits; of none, the one that lacks least."""
    planned = [(each, each.plan) for each in tried if each.plan is not None]
    fitting = [each for each, plan in planned if plan.fits]
    if fitting or not planned:
        return (fitting or list(tried))[0]
    return max(planned, key=lambda pair: spare_bytes(pair[1]))[0]


def try_all(
    config: RunConfig,
    machine: Machine,
    facts: DataFacts | None = None,
    typed: Collection[str] = (),
) -> tuple[Tried, ...]:
    """Every fallback of a config, planned. Arguments and errors as for `choose`."""
    return tuple(_each(config, machine, facts, typed))


def try_until_one_fits(
    config: RunConfig,
    machine: Machine,
    facts: DataFacts | None = None,
    typed: Collection[str] = (),
) -> tuple[Tried, ...]:
    """The fallbacks as far as the first that fits. Arguments and errors as for `choose`."""
    tried = []
    for each in _each(config, machine, facts, typed):
        tried.append(each)
        if each.plan is not None and each.plan.fits:
            break
    return tuple(tried)


def _each(
    config: RunConfig, machine: Machine, facts: DataFacts | None, typed: Collection[str]
) -> Iterator[Tried]:
    read_network(config)  # what is wrong with the model is no matter of a single fallback
    search = Search(config, machine, facts, typed)
    found = methods(config, machine)
    if is_auto(config):
        yield from map(search.fastest, found)
    else:
        plan = search.plan(())
        warned = (*plan.warnings, *costly(search, plan)) if plan.fits else plan.warnings
        yield Tried(found[0].name, dataclasses.replace(plan, warnings=warned))


def costly(search: Search, plan: Plan) -> list[str]:
    """What a run that fits pays for memory that it does not need, a sentence each.

    Args:
        plan: of the config of `search`, as it is.
    """
    found = []
    for words, what in cheaper(search.config):
        try:
            other = search.plan(words)
        except PosttrainError:
            continue
        faster = other.speed.tokens_per_s / plan.speed.tokens_per_s
        if other.fits and faster > WORTH_SAYING:
            found.append(
                f"{what} costs more than it saves: with {' '.join(words)} "
                f"{_gib(spare_bytes(other))} stay free, and it is {faster:.2f} times as fast"
            )
            break
    return found


def with_choice(config: RunConfig, tried: Tried) -> RunConfig:
    """The config that a fallback trains; also of one that is an earlier choice from the same."""
    return config if tried.plan is None else with_words(config, tried.plan.overrides)


def following(choice: Choice) -> Choice | None:
    """What to start after the chosen one ran out of memory; None: nothing that promises less.

    The same method with the settings that take least memory comes first, where that is clearly
    less; then the next fallbacks, each as it was planned or with such settings.
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
    config: RunConfig,
    machine: Machine,
    facts: DataFacts | None = None,
    *,
    most_bytes: int | None = None,
) -> Tried | None:
    """What fits instead of a run that does not: its own method with other settings, or the next.

    Args:
        config: with tuning and engine named.
        most_bytes: that it may take of a device; None: all that there is.
    """
    for candidate in _instead(config):
        search = Search(candidate, machine, facts)
        for method in methods(candidate, machine):
            found = search.fastest(method)
            for plan in (found.plan, found.leanest):
                less = plan is not None and (most_bytes or math.inf) >= plan.device.total_bytes
                if plan is not None and plan.fits and less:
                    return dataclasses.replace(found, plan=plan)
    return None


def _instead(config: RunConfig) -> Iterator[RunConfig]:
    free = with_words(config, (f"{MICRO_BATCH}=1", *checkpointing_words(0, 1)))
    yield free
    yield dataclasses.replace(free, engine=AutoEngine())
    yield dataclasses.replace(free, tuning=AutoTuning(), engine=AutoEngine())


# ------------------------------------------------------------------------------ what is said


def nothing_fits(tried: tuple[Tried, ...]) -> ConfigError:
    """The error that names the smallest miss of all, and what can be done about it."""
    planned = [(each, each.plan) for each in tried if each.plan is not None]
    if not planned:
        refused = "; ".join(f"{each.name}: {each.refused}" for each in tried)
        fix = "name the tuning and the engine"
        return ConfigError(f"no fallback is possible: {refused}", where="tuning", fix=fix)
    each, plan = max(planned, key=lambda pair: spare_bytes(pair[1]))
    what = f"no fallback fits; nearest is {each.name}: {miss(plan)}"
    return ConfigError(what, where="tuning", fix=INVERSE)


def miss(plan: Plan) -> str:
    """What a plan lacks, and on which item most is: the end of a sentence."""
    on_device = plan.spare_bytes < 0
    where = f"a {'GPU' if plan.on_gpu else 'process'}" if on_device else "a host"
    has = plan.capacity_bytes if on_device else plan.host_capacity_bytes
    lacks = -plan.spare_bytes if on_device else -plan.host_spare_bytes
    return f"{_gib(lacks)} are missing on {where} of {_gib(has)}; most is {plan.largest_item}"


def reasons(choice: Choice) -> list[str]:
    """Why those before the chosen one were not taken, one line each."""
    names = [each.name for each in choice.tried]
    before = choice.tried[: names.index(choice.chosen.name)]
    return [f"{each.name}: {_why_not(each)}" for each in before]


def _why_not(tried: Tried) -> str:
    if tried.plan is None:
        return tried.refused
    if tried.plan.fits:  # only a start that failed goes on to the next
        return "it was to fit, and ran out of memory when it was tried"
    return miss(tried.plan)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
