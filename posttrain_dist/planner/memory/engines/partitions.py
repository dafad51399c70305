"""What of the trained parameters each rank holds, element by element, as DeepSpeed 0.19.8 cuts it.

1, 2   each optimizer group flat, padded to a multiple of two elements a rank, in equal parts
       (`stage_1_and_2.py`: flatten_dense_tensors_aligned, get_data_parallel_partitions)
3      each parameter by itself, padded to a multiple of the ranks (`partition_parameters.py`:
       _partition_param); a group's parts end to end, in sub-groups of bounded size
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from posttrain_dist.planner.job import Job, shared_by
from posttrain_dist.planner.memory.parameters import Stored, trained_parameters

_ALIGNMENT = 2  # elements: NCCL wants 4 bytes, DeepSpeed reckons with 16-bit values


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """One optimizer group of stages 1 and 2.

    Attributes:
        numel: with its padding.
        part: of one rank.
    """

    members: tuple[Stored, ...]
    numel: int
    part: int

    @property
    def copied(self) -> bool:
        """Whether flattening makes a new tensor: of a single one without padding it is a view."""
        return len(self.members) > 1 or self.numel > self.members[0].size

    def pieces(self, rank: int) -> list[tuple[Stored, int]]:
        """Parameters of which `rank` has a part, with the elements of it."""
        first, last = rank * self.part, (rank + 1) * self.part
        ends = accumulate(each.size for each in self.members)
        found = []
        for each, end in zip(self.members, ends, strict=True):
            size = min(end, last) - max(end - each.size, first)
            if size > 0:
                found.append((each, size))
        return found

    def ranks(self) -> Iterator[tuple[Stored, range]]:
        """Each parameter with the ranks that have a part of it."""
        ends = accumulate(each.size for each in self.members)
        for each, end in zip(self.members, ends, strict=True):
            yield each, range((end - each.size) // self.part, (end - 1) // self.part + 1)


@shared_by("parameters_key")
def optimizer_groups(job: Job) -> tuple[tuple[Stored, ...], ...]:
    """Trained parameters as `engine/optimizers.py` groups them: by weight decay and rate."""
    groups: dict[tuple[bool, float], list[Stored]] = {}
    for each in trained_parameters(job):
        decays = job.tuning.decays(each.name, each.shape)
        key = (not decays, job.tuning.lr_ratio(each.name))
        groups.setdefault(key, []).append(each)
    return tuple(tuple(groups[key]) for key in sorted(groups))


@shared_by("parameters_key", "workers")
def flat_groups(job: Job) -> tuple[FlatGroup, ...]:
    """The groups of stages 1 and 2."""
    unit = _ALIGNMENT * job.workers
    found = []
    for members in optimizer_groups(job):
        numel = math.ceil(sum(each.size for each in members) / unit) * unit
        found.append(FlatGroup(members, numel, numel // job.workers))
    return tuple(found)


def fullest_rank(groups: Sequence[FlatGroup], workers: int) -> int:
    """The rank that holds most while backward goes on.

    It keeps whole gradients of its parameters. Those of the upper half of the ranks come first,
    when most activations are still there.
    """
    whole = [0] * workers
    for group in groups:
        for each, ranks in group.ranks():
            for rank in ranks:
                whole[rank] += each.size
    return max(range(workers // 2, workers), key=lambda rank: (whole[rank], rank))


def shard(numel: int, workers: int) -> int:
    """Elements of a parameter that each rank holds at stage 3, with padding."""
    return math.ceil(numel / workers)


@shared_by("parameters_key", "workers")
def sub_groups(job: Job, size: int) -> tuple[tuple[Stored, ...], ...]:
    """The sub-groups of stage 3, which are updated one after the other.

    Args:
        size: `sub_group_size`, in elements of one rank.
    """
    found: list[tuple[Stored, ...]] = []
    for members in optimizer_groups(job):
        if sum(shard(each.size, job.workers) for each in members) <= size:
            found.append(members)
            continue
        current: list[Stored] = []
        held = 0
        for i, each in enumerate(members):
            current.append(each)
            held += shard(each.size, job.workers)
            if held >= size or i == len(members) - 1:
                found.append(tuple(current))
                current, held = [], 0
    return tuple(found)
