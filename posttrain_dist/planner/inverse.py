"""The questions the other way round: the largest value that fits, the fewest GPUs that do.

What fits with a value fits with every smaller one, and what fits on nodes fits on more of them: the
answer is found by doubling, then by halving. Only all packs of a rank at once may fit where fewer
do not, for they add up no gradients. Each fallback has an answer of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

from posttrain_dist.config import RunConfig, Slurm
from posttrain_dist.errors import ConfigError
from posttrain_dist.models.architectures.positions import learned_positions
from posttrain_dist.planner.job import DataFacts, Machine
from posttrain_dist.planner.make_job import read_network
from posttrain_dist.planner.methods import (
    MICRO_BATCH,
    Method,
    methods,
    tuning_name,
    workers_of_all,
)
from posttrain_dist.planner.plan import Plan, Tried
from posttrain_dist.planner.search import Search
from posttrain_dist.tuning.injection.targets import ALL_LINEAR, matching

LENGTH, RANK = "data.max_length", "tuning.rank"
GPUS = "gpus"
STEPS = {LENGTH: 128, MICRO_BATCH: 1, RANK: 1}  # what an answer is a multiple of
# What ends at the largest value that is looked at.
BOUNDS = {
    LENGTH: "is as long as the model has positions",
    MICRO_BATCH: "is all the packs that a rank has of a step (train.batch_size over the ranks)",
    RANK: "is the smallest dimension of the layers that are changed",
    GPUS: "is all that is looked at",
}
MOST_TOKENS = 1 << 22  # where the model does not say how many positions it has
MOST_GPUS = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one fallback.

    Attributes:
        value: the largest one, or the fewest; None: it fits with none.
        plan: with this value; of none, the one that lacks least.
        bounded: the value is the largest that there is, whatever the memory.
    """

    name: str
    value: int | None
    plan: Plan | None
    bounded: bool = False
    refused: str = ""


def largest(
    config: RunConfig,
    machine: Machine,
    key: str,
    facts: DataFacts | None = None,
    typed: Collection[str] = (),
) -> list[Answer]:
    """The largest value of `key` with which each fallback fits.

    Args:
        key: one of `STEPS`.

    Raises:
        ConfigError: the planner has no such question.
    """
    if key not in STEPS:
        raise ConfigError(
            f"{key} is not among what can be asked for",
            where="--largest",
            fix=f"use one of {', '.join(STEPS)}",
        )
    step, most = STEPS[key], _most(config, machine, key)
    search = Search(config, machine, None if key == LENGTH else facts, {*typed, key})

    @cache
    def at(count: int) -> Search:
        return search.with_words((f"{key}={min(most, count * step)}",))

    counts = math.ceil(most / step)
    found: list[Answer] = []
    for method in methods(config, machine):
        if key == RANK and not _has_rank(search, method):
            continue
        count = counts
        if key != MICRO_BATCH or not at(counts).fits(method):
            count = _last(lambda count, m=method: at(count).fits(m), counts)  # type: ignore[misc]
        tried = at(count or 1).fastest(method)
        value = min(most, count * step) if count else None
        found.append(_answer(tried, value, (f"{key}={value}",), bounded=count == counts))
    if not found:
        raise ConfigError(
            f"asks for the rank of {tuning_name(config)}, which has none",
            where="--largest",
            fix="name a tuning that has one, such as tuning=lora, or leave tuning out",
        )
    return found


def fewest(
    config: RunConfig,
    machine: Machine,
    facts: DataFacts | None = None,
    typed: Collection[str] = (),
) -> list[Answer]:
    """The fewest GPUs, of nodes like this one, on which each fallback fits.

    Raises:
        ConfigError: the node has no GPU.
    """
    if machine.gpu is None:
        raise ConfigError(
            "there is no GPU to count", where="--fewest", fix="set hardware, such as h100x8"
        )
    per_node = machine.gpus_per_node
    inside, nodes = range(1, per_node), MOST_GPUS // per_node
    sizes = [per_node * number for number in range(1, nodes + 1)]
    search = Search(config, machine, facts, typed)

    @cache
    def at(size: int) -> Search:
        return search.with_words(gpu_words(config, machine, size))

    whole = at(sizes[-1]).config  # the fallbacks of many GPUs; with fewer, some are as others
    found = []
    for method in methods(whole, machine):
        # A host takes more with more ranks on it, each GPU less: one is looked at after the other.
        size = next((count for count in inside if at(count).fits(method)), None)
        if size is None:
            fails = _last(
                lambda count, m=method: not at(sizes[count - 1]).fits(m),  # type: ignore[misc]
                len(sizes),
            )
            size = sizes[fails] if fails < len(sizes) else None
        words = gpu_words(config, machine, size or sizes[-1])
        tried = at(size or sizes[-1]).fastest(method)
        found.append(_answer(tried, size, words))
    return found


def gpu_words(config: RunConfig, machine: Machine, gpus: int) -> tuple[str, ...]:
    """Words that make a run one of so many GPUs: some of a node, or whole nodes."""
    nodes, each = max(1, gpus // machine.gpus_per_node), min(gpus, machine.gpus_per_node)
    if isinstance(config.cluster, Slurm) or nodes > 1:
        option = () if isinstance(config.cluster, Slurm) else ("cluster=slurm",)
        return (*option, f"cluster.nodes={nodes}", f"cluster.gpus_per_node={each}")
    return ("cluster=ray", f"cluster.workers={each}")


def _answer(
    tried: Tried, value: int | None, words: tuple[str, ...], bounded: bool = False
) -> Answer:
    """With the words of the value before those of the fallback."""
    plan = tried.plan
    if plan is not None and value is not None:
        plan = dataclasses.replace(plan, overrides=(*words, *plan.overrides))
    return Answer(tried.name, value, plan, bounded, tried.refused)


def _last(holds: Callable[[int], bool], most: int) -> int:
    """The largest count of 1 to `most` for which `holds`, as it does for all before; 0: none."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, min(2 * high, most) if high < most else most + 1
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _most(config: RunConfig, machine: Machine, key: str) -> int:
    """The largest value that means anything."""
    network = read_network(config)
    if key == RANK:
        targets = matching(list(network.linears()), getattr(config.tuning, "targets", ALL_LINEAR))
        return min(min(one.in_features, one.out_features) for one in targets)
    if key == MICRO_BATCH:
        return math.ceil(config.train.batch_size / workers_of_all(config, machine))
    positions = learned_positions(network.config) or network.config.get("max_position_embeddings")
    return positions if isinstance(positions, int) else MOST_TOKENS


def _has_rank(search: Search, method: Method) -> bool:
    return any(hasattr(search.with_words(words).config.tuning, "rank") for words in method.ways)
