"""ZeRO-3 on one rank: a shard of everything, and for a while what is gathered.

After deepspeed 0.19.8, runtime/zero/stage3.py:

    attach       shards of what is trained move into one flat tensor; float32 masters; a bucket and
                 the shards of the gradients, which stay for the whole run
    backward     a gradient is copied into the bucket, if it has room; a full bucket is reduced,
                 and of each gradient the shard of this rank stays
    step         what is gathered goes; sub-group by sub-group: gradients in float32, AdamW, weights
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.engines.base import Call
from posttrain_dist.planner.memory.engines.ds_settings import elements, layer_of, zero_settings
from posttrain_dist.planner.memory.engines.gathered import Gathered
from posttrain_dist.planner.memory.engines.partitions import shard, sub_groups
from posttrain_dist.planner.memory.engines.whole_tensors import (
    release_all,
    touch_whole_state,
)
from posttrain_dist.planner.memory.ledger import Block, Ledger
from posttrain_dist.planner.memory.parameters import Stored, stored_parameters
from posttrain_dist.planner.plan import Item

_NORM_BYTES = 8  # an element of a gradient while its norm is taken, in float64


class ShardedMemory:
    """What a rank of stage 3 holds, on a ledger of its device."""

    def __init__(self, job: Job, ledger: Ledger) -> None:
        self._job, self._ledger, self._settings = job, ledger, zero_settings(job)
        self._stored = {s.name: s for s in stored_parameters(job) if s.parameter}
        self._groups = sub_groups(job, self._settings.sub_group_size)
        self._bucket: dict[str, Block | None] = {}  # None: it was copied into the buffer
        self._filled = 0
        self._leaf: dict[str, Block] = {}  # gradients of the layer whose backward is under way
        self._moments: dict[int, Block] = {}
        self._persistent: list[Block] = []
        self._hooked: str | None = None  # the leaf whose backward is under way
        self._of_output: list[Block] = []
        self._gathered = Gathered(job, ledger, self._settings)

    # ------------------------------------------------------------------------------------ attach

    def load(self) -> None:
        """Shards as the model is loaded, then what `deepspeed.initialize` makes of them."""
        job, ledger, settings = self._job, self._ledger, self._settings
        shards = self._load_weights()
        trained = [each for group in self._groups for each in group]
        if not settings.offload_param and not job.on_gpu:
            # `defragment` goes through host memory, which is the same one here.
            for item in {each.item for each in trained}:
                members = [each for each in trained if each.item is item]
                ledger.allocate(item, sum(map(self.shard_bytes, members)))
            for each in trained:
                ledger.release(shards[each.name])
        if not settings.offload_optimizer:
            self._load_optimizer()
        if settings.contiguous_gradients:
            ledger.allocate(Item.buckets, settings.reduce_bucket_size * job.value_bytes)
        if not settings.offload_optimizer:
            ledger.allocate(Item.gradients, self.shard_elements() * settings.gradient_bytes)
        ledger.touch(Item.gathered, max(each.num_bytes for each in trained))
        self._gather_persistent()

    def _load_weights(self) -> dict[str, Block]:
        """Shards, made tensor by tensor; a base in NF4 is whole on every rank before."""
        ledger, offloaded = self._ledger, self._settings.offload_param
        stored = stored_parameters(self._job)
        packed = any(each.item is Item.quantisation for each in stored)
        shards: dict[str, Block] = {}
        whole: dict[str, Block] = {}
        for each in stored:
            if packed or not each.parameter:
                whole[each.name] = ledger.allocate(each.item, each.num_bytes)
        for each in self._stored.values():
            if not offloaded:
                shards[each.name] = ledger.allocate(each.item, self.shard_bytes(each))
            if packed:
                ledger.release(whole[each.name])
        if not packed:
            ledger.touch(Item.loading, max(each.num_bytes for each in self._stored.values()))
        return shards

    def _load_optimizer(self) -> None:
        ledger = self._ledger
        for group in self._groups:
            size = self._group_elements(group) * 4
            wide = ledger.allocate(Item.workspace, size) if self._job.value_bytes < 4 else None
            ledger.allocate(Item.master, size)
            if wide is not None:
                ledger.release(wide)
        ledger.touch(Item.gradients, max(map(self._group_elements, self._groups)) * 4)

    def shard_bytes(self, stored: Stored) -> int:
        """Of one parameter on each rank."""
        count = elements(stored, self._job.value_bytes)
        return shard(count, self._job.workers) * (stored.num_bytes // count)

    def shard_elements(self) -> int:
        """Of all that is trained, on each rank."""
        return sum(map(self._group_elements, self._groups))

    def _group_elements(self, group: Sequence[Stored]) -> int:
        return sum(shard(each.size, self._job.workers) for each in group)

    def is_persistent(self, name: str) -> bool:
        """Whether a parameter stays whole: a small one."""
        stored = self._stored[name]
        return elements(stored, self._job.value_bytes) <= self._settings.param_persistence_threshold

    def _gather_persistent(self) -> None:
        if self._job.workers == 1 and not self._settings.offload_param:
            return
        self._persistent = [
            self._ledger.allocate(Item.gathered, each.num_bytes)
            for name, each in self._stored.items()
            if self.is_persistent(name)
        ]

    # ------------------------------------------------------------------- forward and backward

    def gather(self, parameters: Sequence[str], *, backward: bool) -> None:
        """A module is to run: its parameters become whole, and some of those behind it."""
        self._gathered.before(parameters, backward=backward)
        if backward and self._settings.leaf:
            self._hold_gradient(layer_of(self._job, parameters[0]))

    def release(self, parameters: Sequence[str], *, backward: bool) -> None:
        """It ran: its parameters go, unless they are needed soon."""
        self._gathered.after()

    def run(
        self, prefix: str, calls: Sequence[Call], taken: Sequence[int], *, backward: bool
    ) -> None:
        """Module after module becomes whole, and goes."""
        if backward and self._settings.leaf:
            self._hold_gradient(layer_of(self._job, prefix))
        self._gathered.run(prefix, calls, taken, backward=backward)

    def _hold_gradient(self, layer: str | None) -> None:
        """The hook of a leaf has the gradient of its output until that of its input is there."""
        if layer == self._hooked:
            return
        release_all(self._ledger, self._of_output)
        self._hooked, self._of_output = layer, []
        if layer is not None:
            shape = self._job.network.shape
            size = self._job.row_tokens * shape.hidden_size * self._job.value_bytes
            self._of_output = [self._ledger.allocate(Item.activations, size)]

    def before_backward(self, *, last: bool) -> None:
        """Every micro-batch is the same: gradients are reduced in each."""

    def gradient(self, parameter: str, block: Block) -> None:
        """As the hook of a parameter does; of a layer that is gathered as one, when it is done."""
        layer = layer_of(self._job, parameter) if self._settings.leaf else None
        if self._leaf and layer_of(self._job, next(iter(self._leaf))) != layer:
            self._end_leaf()
        if layer is not None:
            self._leaf[parameter] = block
        else:
            self._into_bucket(parameter, block)

    def after_backward(self, *, last: bool) -> None:
        """What is left in the bucket is reduced."""
        self._hold_gradient(None)
        self._gathered.end()
        self._end_leaf()
        self._reduce()

    def _end_leaf(self) -> None:
        waiting, self._leaf = self._leaf, {}
        for name, block in waiting.items():
            self._into_bucket(name, block)

    def _into_bucket(self, name: str, block: Block) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`, `__add_grad_to_ipg_bucket`."""
        settings, size = self._settings, self._stored[name].size
        if self._filled and self._filled + size > settings.reduce_bucket_size:
            self._reduce()
        fits = self._filled + size <= settings.reduce_bucket_size
        if settings.contiguous_gradients and fits:
            self._ledger.release(block)
            self._bucket[name] = None
        else:
            self._bucket[name] = block
        self._filled += size

    def _reduce(self) -> None:
        """Average and keep the shard; on the way there is another copy of the bucket."""
        if not self._bucket:
            return
        job, settings = self._job, self._settings
        sizes = [self._stored[name].size for name in self._bucket]
        padded = sum(shard(size, job.workers) * job.workers for size in sizes)
        fits = self._filled <= settings.reduce_bucket_size
        if settings.contiguous_gradients and fits and not settings.reduce_scatter:
            copied = self._filled if job.workers > 1 else 0
        else:
            single = len(sizes) == 1 and sizes[0] % job.workers == 0
            copied = 0 if single else padded
        self._ledger.touch(Item.buckets, copied * job.value_bytes)
        for block in self._bucket.values():
            if block is not None:
                self._ledger.release(block)
        self._bucket, self._filled = {}, 0

    # ------------------------------------------------------------------------------------ update

    def update(self) -> None:
        """`step`: the norm, then sub-group by sub-group; what is small is gathered again."""
        ledger, job, settings = self._ledger, self._job, self._settings
        release_all(ledger, self._persistent)
        self._persistent = []
        if not settings.offload_optimizer:
            ledger.touch(Item.workspace, self.shard_elements())  # which are infinite
            largest = max(s.size for group in self._groups for s in group)
            ledger.touch(Item.workspace, shard(largest, job.workers) * _NORM_BYTES)
            for i, group in enumerate(self._groups):
                count = self._group_elements(group)
                flat = ledger.allocate(Item.gradients, count * settings.gradient_bytes)
                if settings.gradient_bytes < 4:
                    wide = ledger.allocate(Item.gradients, count * 4)
                    ledger.release(flat)
                    flat = wide
                if i not in self._moments:
                    self._moments[i] = ledger.allocate(Item.moments, count * 8)
                ledger.release(flat)
        self._gather_persistent()
        self._gathered.know_order()

    # ------------------------------------------------------------------------------------- files

    def save(self) -> None:
        """Copies of a checkpoint on the device: of small tunings, one parameter's state whole."""
        self._gathered.end()
        touch_whole_state(self._job, self._ledger)

    def export(self) -> None:
        """Parameters become whole, one after the other."""
        self._gathered.end()
        self._ledger.touch(Item.gathered, max(s.num_bytes for s in self._stored.values()))
