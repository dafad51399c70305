"""ZeRO 1 and 2 on one rank: flat weights, one part of the optimizer state, gradients by buckets.

After deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:

    attach       a group's parameters are copied into one flat tensor, by way of the host where the
                 GPU has no room for both; its part of it becomes a float32 master; gradients of
                 the same size are made once, and dropped
    backward     2, or 1 that overlaps: each gradient goes into a bucket as it is made; of the
                 parameters in this rank's part the whole gradient stays
                 1: gradients stay where they are, and go through buckets after the last backward
    step         group by group: the parts of the gradients as one float32 tensor, AdamW, weights
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.engines.base import Call
from posttrain_dist.planner.memory.engines.ds_settings import zero_settings
from posttrain_dist.planner.memory.engines.partitions import FlatGroup, flat_groups, fullest_rank
from posttrain_dist.planner.memory.engines.whole_tensors import (
    release_all,
    touch_most,
    touch_whole_state,
)
from posttrain_dist.planner.memory.ledger import Block, Ledger
from posttrain_dist.planner.memory.parameters import (
    Stored,
    stored_parameters,
    trained_parameters,
)
from posttrain_dist.planner.plan import Item

_NORM_BYTES = 8  # an element of a gradient while its norm is taken, in float64


class FlatMemory:
    """What a rank of stage 1 or 2 holds, on a ledger of its device."""

    def __init__(self, job: Job, ledger: Ledger, rank: int | None = None) -> None:
        self._job, self._ledger, self._settings = job, ledger, zero_settings(job)
        self._groups = flat_groups(job)
        rank = fullest_rank(self._groups, job.workers) if rank is None else rank
        self._pieces = [group.pieces(rank) for group in self._groups]
        # A group with more ranks than parameters leaves some ranks with zeros alone.
        self._own = {each.name for pieces in self._pieces for each, _ in pieces}
        self._parts = {each.name: size for pieces in self._pieces for each, size in pieces}
        self._ranks = {each.name: ranks for group in self._groups for each, ranks in group.ranks()}
        self._sizes = {s.name: s.size for s in trained_parameters(job)}
        self._last = True
        self._made: dict[str, Block] = {}  # `param.grad` with a storage of its own
        self._kept: dict[str, Block] = {}  # of own parameters, over micro-batches; "" a common one
        self._buffers: list[Block] = []
        self._own_buffer: Block | None = None
        self._bucket: list[str] = []
        self._filled = 0
        self._moments: dict[int, Block] = {}

    # ------------------------------------------------------------------------------------ attach

    def load(self) -> None:
        """Weights as they come, then what `deepspeed.initialize` makes of them."""
        job, ledger, value = self._job, self._ledger, self._job.value_bytes
        loaded = {s.name: ledger.allocate(s.item, s.num_bytes) for s in stored_parameters(job)}
        for group in self._groups:
            if group.copied:
                self._flatten(group, [loaded[each.name] for each in group.members])
            # A copy of the part, which then becomes float32, or goes to the host.
            offloaded = self._settings.offload_optimizer
            clone = None
            if value < 4 or offloaded:
                clone = ledger.allocate(Item.workspace, group.part * value)
            if not offloaded:
                ledger.allocate(Item.master, group.part * 4)
            if clone is not None:
                ledger.release(clone)
        if self._settings.offload_optimizer:
            largest = max(self._sizes.values())
            ledger.allocate(Item.buckets, largest * value)  # temp_grad_buffer_for_gpu_offload
        else:
            zeros = [ledger.allocate(Item.gradients, g.part * 4) for g in self._groups]
            release_all(ledger, zeros)

    def _flatten(self, group: FlatGroup, members: Sequence[Block]) -> None:
        """`flatten_on_accelerator`; else each parameter is moved to the host, and flattened there.

        On a CPU both are one memory, which holds a group twice.
        """
        ledger, flat = self._ledger, group.numel * self._job.value_bytes
        if self._job.on_gpu:
            ledger.touch_if_room(flat, on_host=2 * flat)
            release_all(ledger, members)
            ledger.allocate(group.members[0].item, flat)
        else:
            ledger.allocate(group.members[0].item, flat)
            release_all(ledger, members)

    # ---------------------------------------------------------------------------------- backward

    def gather(self, parameters: Sequence[str], *, backward: bool) -> None:
        """Every parameter is whole."""

    def release(self, parameters: Sequence[str], *, backward: bool) -> None:
        """Every parameter stays whole."""

    def run(
        self, prefix: str, calls: Sequence[Call], taken: Sequence[int], *, backward: bool
    ) -> None:
        """Every parameter is whole all the time."""
        touch_most(self._ledger, taken)

    def before_backward(self, *, last: bool) -> None:
        """A micro-batch's backward begins; `last` of the update."""
        self._last = last

    def gradient(self, parameter: str, block: Block) -> None:
        """As the hook of a parameter does, or torch where there is none."""
        if parameter in self._made:  # of earlier micro-batches: added in place
            self._ledger.release(block)
        else:
            self._made[parameter] = block
        if self._reduces_as_it_goes():
            self._into_bucket(parameter)

    def after_backward(self, *, last: bool) -> None:
        """The end of `engine.backward`: what is left in buckets, and what is kept of it."""
        if self._settings.stage == 1 and not last:
            return
        if not self._reduces_as_it_goes():
            for group in self._groups:
                for each in group.members:
                    if each.name in self._made:
                        self._into_bucket(each.name)
        self._reduce()
        kept = {name: self._made.pop(name) for name in list(self._made) if name in self._own}
        if self._own_buffer is not None:
            kept[""] = self._own_buffer
            self._own_buffer = None
        if self._kept or self._settings.offload_optimizer:
            release_all(self._ledger, kept.values())  # added to those of the micro-batches before
        else:
            self._kept = kept
        release_all(self._ledger, self._made.values())
        self._made.clear()
        release_all(self._ledger, self._buffers)
        self._buffers = []

    def _reduces_as_it_goes(self) -> bool:
        settings = self._settings
        if settings.stage == 2:
            return True
        return settings.overlap_comm and self._last

    def _into_bucket(self, name: str) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`."""
        settings, size = self._settings, self._sizes[name]
        if settings.contiguous_gradients and not self._buffers:
            num_bytes = settings.reduce_bucket_size * self._job.value_bytes
            count = 2 if settings.overlap_comm else 1
            self._buffers = [self._ledger.allocate(Item.buckets, num_bytes) for _ in range(count)]
        if self._filled + size > settings.reduce_bucket_size:
            self._reduce()
        if settings.contiguous_gradients and size <= settings.reduce_bucket_size:
            self._ledger.release(self._made.pop(name))  # it is a part of the bucket now
        self._bucket.append(name)
        self._filled += size

    def _reduce(self) -> None:
        """`reduce_ipg_grads`: average what is in the bucket; keep what is of this rank."""
        if not self._bucket:
            return
        settings, value = self._settings, self._job.value_bytes
        if self._is_copied():
            self._ledger.touch(Item.buckets, self._filled * value)
        for name in self._bucket:
            own = name in self._own
            if own and settings.contiguous_gradients and not settings.offload_optimizer:
                if self._own_buffer is None:
                    total = sum(self._sizes[each] for each in self._own)
                    self._own_buffer = self._ledger.allocate(Item.gradients, total * value)
                self._drop(name)
            elif (settings.stage == 2 and not own) or settings.offload_optimizer:
                self._drop(name)
        self._bucket, self._filled = [], 0

    def _is_copied(self) -> bool:
        """Whether averaging makes one tensor of several: always but of a single one."""
        if not self._settings.contiguous_gradients:
            return len(self._bucket) > 1
        if not self._settings.reduce_scatter:
            return False
        owners: list[int] = []
        for name in self._bucket:
            owners += [rank for rank in self._ranks[name] if owners[-1:] != [rank]]
        return len(owners) > 1

    def _drop(self, name: str) -> None:
        if name in self._made:
            self._ledger.release(self._made.pop(name))

    # ------------------------------------------------------------------------------------ update

    def update(self) -> None:
        """`step`: the norm, then group by group."""
        if self._settings.offload_optimizer:
            return
        ledger, value = self._ledger, self._job.value_bytes
        if self._parts:
            ledger.touch(Item.workspace, max(self._parts.values()) * _NORM_BYTES)
        for i, (group, pieces) in enumerate(zip(self._groups, self._pieces, strict=True)):
            padding = group.part - sum(size for _, size in pieces)
            flat = None
            if len(pieces) + bool(padding) > 1:
                flat = ledger.allocate(Item.gradients, group.part * value)
            if value < 4:
                wide = ledger.allocate(Item.gradients, group.part * 4)
                if flat is not None:
                    ledger.release(flat)
                flat = wide
            if value < 4 or flat is not None:
                self._forget(pieces, last=i == len(self._groups) - 1)
            if i not in self._moments:
                self._moments[i] = ledger.allocate(Item.moments, group.part * 8)
            if flat is not None:
                ledger.release(flat)
            self._forget(pieces, last=i == len(self._groups) - 1)

    def _forget(self, pieces: Sequence[tuple[Stored, int]], *, last: bool) -> None:
        """Gradients of a group go once there is a copy; of a common buffer, with the last group."""
        names = ["", *(each.name for each, _ in pieces)] if last else [s.name for s, _ in pieces]
        release_all(self._ledger, [self._kept.pop(n) for n in names if n in self._kept])

    # ------------------------------------------------------------------------------------- files

    def save(self) -> None:
        """Copies of a checkpoint on the device: of small tunings, one parameter's state whole."""
        touch_whole_state(self._job, self._ledger)

    def export(self) -> None:
        """Every parameter is whole as it is."""
