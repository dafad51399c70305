"""What is planned, in numbers: a completed RunConfig and the machine, put together once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from operator import add, attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from posttrain_dist.config import RunConfig
from posttrain_dist.data.prepared.summary import Summary
from posttrain_dist.engine import AdamW, Engine
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.network.tensors import Network
from posttrain_dist.planner.objective.objective_facts import ObjectiveFacts
from posttrain_dist.tuning.base import Tuning

if TYPE_CHECKING:
    from posttrain_dist.planner.memory.packed_rows import PackedRow, PackedRows

P = ParamSpec("P")
T = TypeVar("T")
_MOST_SHARED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One node, nothing of it unknown; made of the group `hardware` and of what is here.

    Attributes:
        gpu: name in the table of devices; None: the run is on CPUs.
        link_bytes_s: of one GPU to the others of its node; network_bytes_s: to other nodes.
    """

    gpu: str | None
    gpus_per_node: int
    gpu_memory_bytes: int
    host_memory_bytes: int
    cpus_per_node: int
    link_bytes_s: float
    network_bytes_s: float
    host_link_bytes_s: float
    storage_bytes_s: float
    node_failure_s: float
    margin: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """The training split of a prepared folder, in numbers.

    Attributes:
        tokens: of all samples, once.
        supervised: of these, those with a weight in the loss.
        longest: tokens of the longest sample, held-out ones included.
        heldout_tokens: of the samples that evaluation reads.
        rows: what is packed of it; None: not known.
    """

    tokens: int
    supervised: int
    longest: int
    channels: int
    heldout_tokens: int
    rows: PackedRows | None = None

    @classmethod
    def read(cls, folder: Path) -> DataFacts:
        """What `prepare` found and wrote.

        Raises:
            DataError: the folder was not prepared, or by another version.
        """
        # numpy, which a plan without data does not need, takes a tenth of a second.
        from posttrain_dist.data.prepared.arrays import Examples
        from posttrain_dist.planner.memory.packed_rows import PackedRows

        summary = Summary.read(folder)
        examples = Examples.open(folder, "train", summary.channels)
        train, heldout = (summary.splits.get(split, {}).values() for split in ("train", "eval"))
        return cls(
            tokens=sum(counts.tokens for counts in train),
            supervised=sum(counts.supervised for counts in train),
            longest=summary.longest,
            channels=len(summary.channels),
            heldout_tokens=sum(counts.tokens for counts in heldout),
            rows=PackedRows(examples) if len(examples) else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One run: nothing in it is `auto` any more. Equal to itself alone, so that it is a key.

    Attributes:
        value_bytes: of a weight or activation: 2 in bfloat16, 4 in float32.
        row_tokens: of one micro-batch, the heaviest that is possible: max_length times packs.
        row_lengths: of the samples of that row; as few as possible, each `sample_tokens` long.
        row_parents: of each the earlier sample of the row that it follows; -1: none.
        row_before: tokens that each follows: of its parent, and of the parent's parents.
        found_rows: of the prepared data, of which one takes the most memory; empty: not known.
        supervised_share: of the tokens; 1 where the data is not known.
        sample_tokens: of the longest sample with those that it follows; max_length where the data
            is not known.
        objective: what of it the plan depends on.
        attention: sdpa, eager, varlen or flash: what will run, as `models/attention.py` chooses.
        workers: ranks of the whole run; local_workers: of one node.
        accumulation: micro-batches of an update, of the rank that has most.
        tokens: of the whole run; None: not known.
        data_tokens: of the samples that it draws, each once, and held-out ones; None: not known.
        parameters_key: equal for jobs that hold the same parameters and train the same of them.
    """

    network: Network
    model: ModelConfig
    tuning: Tuning
    optimizer: AdamW
    engine: Engine
    machine: Machine
    value_bytes: int
    row_tokens: int
    sample_tokens: int
    row_lengths: tuple[int, ...]
    row_parents: tuple[int, ...]
    found_rows: tuple[PackedRow, ...]
    supervised_share: float
    objective: ObjectiveFacts
    attention: str
    batch_size: int
    micro_batch_size: int
    accumulation: int
    workers: int
    local_workers: int
    evaluates: bool
    num_channels: int
    tokens: int | None
    data_tokens: int | None
    config: RunConfig  # what it was made of, for what is shown
    row_before: tuple[int, ...] = field(init=False, repr=False)
    parameters_key: Hashable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        key = (self.network, repr(self.tuning), self.value_bytes, len(self.model.add_tokens))
        object.__setattr__(self, "parameters_key", key)
        before = tokens_before(self.row_lengths, self.row_parents)
        object.__setattr__(self, "row_before", before)

    @property
    def on_gpu(self) -> bool:
        """Whether the ranks have GPUs."""
        return self.machine.gpu is not None

    @property
    def row_roots(self) -> int:
        """Samples of the row that follow no other."""
        return sum(parent < 0 for parent in self.row_parents)

    def with_row(self, lengths: Sequence[int], parents: Sequence[int] = ()) -> Job:
        """The same with a row of samples of these lengths; `parents`: see `row_parents`."""
        parents = parents or [-1] * len(lengths)
        before = tokens_before(lengths, parents)
        return replace(
            self,
            row_tokens=sum(lengths),
            sample_tokens=max(map(add, before, lengths)),
            row_lengths=tuple(lengths),
            row_parents=tuple(parents),
            found_rows=(),
        )

    @property
    def recomputed_layers(self) -> int:
        """How many layers, from the first, drop their activations."""
        from posttrain_dist.models import Checkpointing

        mode = self.model.activation_checkpointing
        if mode is Checkpointing.selective:
            return min(self.model.checkpoint_layers or 0, len(self.network.layers))
        return len(self.network.layers) if mode is Checkpointing.full else 0


def tokens_before(lengths: Sequence[int], parents: Sequence[int]) -> tuple[int, ...]:
    """Tokens that each sample of a row follows."""
    before: list[int] = []
    for parent in parents:
        before.append(0 if parent < 0 else before[parent] + lengths[parent])
    return tuple(before)


def fullest_row(row_tokens: int, longest: int) -> tuple[int, ...]:
    """Lengths of the samples of a row that are as long as they may be."""
    full, rest = divmod(row_tokens, longest)
    return (longest,) * full + ((rest,) if rest else ())


def shared_by(
    *attributes: str,
) -> Callable[[Callable[Concatenate[Job, P], T]], Callable[Concatenate[Job, P], T]]:
    """Cache a function of a job by those attributes of it that the function reads.

    The many plans of a search differ in little: what does not follow from that is found once.
    """
    read = attrgetter(*attributes)

    def decorate(
        function: Callable[Concatenate[Job, P], T],
    ) -> Callable[Concatenate[Job, P], T]:
        known: dict[Hashable, T] = {}

        @wraps(function)
        def found(job: Job, /, *args: P.args, **kwargs: P.kwargs) -> T:
            key = (read(job), *args, *kwargs.items())
            if key not in known:
                if len(known) == _MOST_SHARED:
                    del known[next(iter(known))]
                known[key] = function(job, *args, **kwargs)
            return known[key]

        return found

    return decorate
