"""ZeRO 1 and 2 on one rank: flat weights, one part of the optimizer state, gradients by buckets.

After deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:

    attach       a group's parameters are copied into one flat tensor; its part of it becomes a
                 float32 master; gradients of the same size are made once, and dropped
    backward     2, or 1 that overlaps: each gradient goes into a bucket as it is made; of the
                 parameters in this rank's part the whole gradient stays
                 1: gradients stay where they are, and go through buckets after the last backward
    step         group by group: the parts of the gradients as one float32 tensor, AdamW, weights
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.engines.ds_settings import zero_settings
from posttrain_dist.planner.memory.engines.partitions import flat_groups
from posttrain_dist.planner.memory.ledger import Block, Ledger
from posttrain_dist.planner.memory.parameters import stored_parameters
from posttrain_dist.planner.plan import Item

_NORM_BYTES = 8  # an element of a gradient while its norm is taken, in float64


class FlatMemory:
    """What a rank of stage 1 or 2 holds, on a ledger of its device."""

    def __init__(self, job: Job, ledger: Ledger, rank: int | None = None) -> None:
        self._job, self._ledger, self._settings = job, ledger, zero_settings(job)
        self._groups = flat_groups(job)
        rank = max(g.heaviest_rank() for g in self._groups) if rank is None else rank
        self._pieces = [group.pieces(rank) for group in self._groups]
        # A group with more ranks than parameters leaves some ranks with zeros alone.
        self._own = {each.name for pieces in self._pieces for each, _ in pieces}
        self._parts = {each.name: size for pieces in self._pieces for each, size in pieces}
        self._split = _ranks_by_name(self._groups, job.workers)
        self._sizes = {s.name: s.size for s in stored_parameters(job) if s.trained}
        self._last = True
        self._made: dict[str, Block] = {}  # `param.grad` with a storage of its own
        self._kept: list[Block] = []  # gradients of own parameters, over micro-batches
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
                ledger.allocate(group.members[0].item, group.numel * value)
                for each in group.members:
                    ledger.release(loaded[each.name])
            if not self._settings.offload_optimizer:
                if value < 4:  # a copy of the part, which then becomes float32
                    clone = ledger.allocate(Item.workspace, group.part * value)
                ledger.allocate(Item.master, group.part * 4)
                if value < 4:
                    ledger.release(clone)
        if self._settings.offload_optimizer:
            largest = max(self._sizes.values())
            ledger.allocate(Item.buckets, largest * value)  # temp_grad_buffer_for_gpu_offload
        else:
            zeros = [ledger.allocate(Item.gradients, g.part * 4) for g in self._groups]
            _release(ledger, zeros)

    # ---------------------------------------------------------------------------------- backward

    def gather(self, parameters: Sequence[str], *, backward: bool) -> None:
        """Every parameter is whole."""

    def release(self, parameters: Sequence[str], *, backward: bool) -> None:
        """Every parameter stays whole."""

    def before_backward(self, *, last: bool) -> None:
        """A micro-batch's backward begins; `last` of the update."""
        self._last = last

    def gradient(self, parameter: str, block: Block) -> None:
        """As the hook of a parameter does, or torch where there is none."""
        if not self._reduces_as_it_goes():
            if parameter in self._made:
                self._ledger.release(block)  # added in place
            else:
                self._made[parameter] = block
            return
        if parameter in self._made:  # of earlier micro-batches
            self._ledger.release(block)
        else:
            self._made[parameter] = block
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
        kept = [self._made.pop(name) for name in list(self._made) if name in self._own]
        if self._own_buffer is not None:
            kept.append(self._own_buffer)
            self._own_buffer = None
        if self._settings.offload_optimizer:
            _release(self._ledger, kept)
        elif self._kept:
            _release(self._ledger, kept)  # added to those of the micro-batches before
        else:
            self._kept = kept
        _release(self._ledger, list(self._made.values()))
        self._made.clear()
        _release(self._ledger, self._buffers)
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
            elif settings.stage == 2 and not own:
                self._drop(name)
            elif settings.offload_optimizer:
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
            owners += [rank for rank in self._split[name] if not owners or rank != owners[-1]]
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
            if i == len(self._groups) - 1 or not self._settings.contiguous_gradients:
                self._forget(i)
            if i not in self._moments:
                self._moments[i] = ledger.allocate(Item.moments, group.part * 8)
            if flat is not None:
                ledger.release(flat)
        _release(ledger, self._kept)
        self._kept = []

    def _forget(self, group: int) -> None:
        """The gradients of a group go once there is a float32 copy; a common buffer with the last."""
        if self._settings.contiguous_gradients:
            _release(self._ledger, self._kept)
            self._kept = []
            return
        count = len(self._pieces[group])
        _release(self._ledger, self._kept[:count])
        self._kept = self._kept[count:]

    def save(self) -> None:
        """Nothing is copied on the device: `torch.save` takes storages one after the other."""


def _ranks_by_name(groups: Sequence, workers: int) -> dict[str, list[int]]:  # type: ignore[type-arg]
    found: dict[str, list[int]] = {}
    for group in groups:
        for rank in range(workers):
            for each, _ in group.pieces(rank):
                found.setdefault(each.name, []).append(rank)
    return found


def _release(ledger: Ledger, blocks: Sequence[Block]) -> None:
    for block in blocks:
        ledger.release(block)
