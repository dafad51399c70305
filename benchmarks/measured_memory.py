"""What a run really allocates, phase by phase, counted in this process.

    found = measure(config, row_tokens=[512, 512], supervised_share=0.5)
    found["phases"]["backward"]        bytes of all tensors alive at the fullest moment of backward

`measure` goes through the same calls as `train.py`: engine and policy of a config, the start-up
checks, updates, an evaluation, a save. Tensors are counted by their storages, each from the
operation that makes it to the moment when its last holder lets go (`StorageCounter`); what a kernel
allocates for itself inside of one operation is seen by torch's profiler only, whose trace
`profiled=True` puts beside it. Under a dispatch mode torch adds no gradient in place to another, so
the backward is traced once more without one. Resident memory is of no use: the allocator keeps what
is freed. On a GPU the allocator's own counter is read. Call it in a process of its own.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import measured_reference
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain_dist import dist
from posttrain_dist.build import build_policy, make_engine, pick_dtype
from posttrain_dist.checkpoint.trained_state import save_trained
from posttrain_dist.config import RunConfig
from posttrain_dist.data.packs.collate import collate, filler
from posttrain_dist.data.packs.probe import make_probe
from posttrain_dist.dist import Process
from posttrain_dist.flow import Batch, Example

NUM_CHANNELS = 2
BACKWARD, REFERENCE = "backward", "reference log-probabilities"


class StorageCounter(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most of each phase.

    Args:
        detailed: also keep what was alive at the peak of each phase, by the operation that made it.
    """

    def __init__(self, *, detailed: bool = False) -> None:
        super().__init__()
        self.total = 0
        self.peaks: dict[str, int] = {}
        self.alive_at_peak: dict[str, Counter[tuple[str, int]]] = {}
        self._phase, self._detailed = "", detailed
        self._alive: dict[int, tuple[Any, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, str(func))
        return result

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is alive inside counts for `name`."""
        before, self._phase = self._phase, name
        self._look()
        yield
        self._phase = before

    def _add(self, tensor: torch.Tensor, made_by: str) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if tensor.device.type == "meta" or (known is not None and known[1] == num_bytes):
            return
        if known is not None:  # it was resized
            self.total -= known[1]
            made_by = known[2]
        self._alive[key] = (weakref.ref(storage, partial(self._freed, key)), num_bytes, made_by)
        self.total += num_bytes
        self._look()

    def _freed(self, key: int, _: Any) -> None:
        entry = self._alive.pop(key, None)
        self.total -= entry[1] if entry else 0

    def _look(self) -> None:
        if self.total > self.peaks.get(self._phase, -1):
            self.peaks[self._phase] = self.total
            if self._detailed:
                alive = Counter((made_by, n) for _, n, made_by in self._alive.values())
                self.alive_at_peak[self._phase] = alive


class _CudaCounter:
    """The same figures of a GPU, from torch's allocator."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.reserved: dict[str, int] = {}

    def __enter__(self) -> _CudaCounter:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is alive inside counts for `name`."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated())
        self.reserved[name] = max(self.reserved.get(name, 0), torch.cuda.max_memory_reserved())


def _row(
    sample_tokens: Sequence[int],
    parents: Sequence[int],
    supervised_share: float,
    vocab_size: int,
    seed: int,
    own_rows: bool,
) -> Batch:
    """A row of random tokens: of units where samples have parents."""
    if not parents:
        return _batch(sample_tokens, supervised_share, vocab_size, seed)
    units = _units(sample_tokens, parents, vocab_size, seed, own_rows)
    return collate(units, own_rows=own_rows)


# ------------------------------------------------------------------------------------ one run


def measure(
    config: RunConfig,
    sample_tokens: Sequence[int],
    *,
    parents: Sequence[int] = (),
    supervised_share: float = 1.0,
    accumulation: int = 1,
    process: Process | None = None,
    updates: int = 2,
    detailed: bool = False,
    profiled: bool = False,
) -> dict[str, Any]:
    """Build, check, train, evaluate and save as `train.py` does, and count.

    Args:
        config: completed; `model.weights=random` needs no file but config.json.
        sample_tokens: lengths of the samples of one micro-batch, one packed row.
        parents: of each the earlier sample that it follows, -1 of a prompt, whose tokens are no
            targets; empty: none follows another.
        accumulation: such rows of an update.
        process: rank and world of this process; with DeepSpeed the group must be there.
        updates: from the second on the moments are there before the forward.
        profiled: also what torch's profiler says of the last update.

    Returns:
        "phases": name of `PhaseName` -> bytes; "policy" -> parameters; with `detailed`
        "alive": phase -> the largest [operation, bytes, count]; with `profiled`, "profiler": bytes
        of the last update by the profiler and by the counter, both over its start.
    """
    process = process or Process()
    dtype = pick_dtype(config.train.dtype, config)
    on_gpu = dist.device(process).type == "cuda"
    counter: Any = _CudaCounter() if on_gpu else StorageCounter(detailed=detailed)
    with counter:
        with counter.phase("load"):
            engine = make_engine(config, process, dtype)
            channels = [f"channel {i}" for i in range(NUM_CHANNELS)]
            policy = build_policy(config, engine, dtype, channels)
            shape = (sample_tokens, parents, supervised_share, int(policy.config.vocab_size))
            rows = (_row(*shape, i, config.objective.own_rows) for i in range(accumulation))
            batches = [row.to(engine.device) for row in rows]
            before, live = measured_reference.scores_of(
                config, process, engine, policy, dtype, NUM_CHANNELS
            )
            _start_up_checks(config, engine, policy, batches[0])
        gc.collect()
        with counter.phase(REFERENCE) if before or live else nullcontext():
            for batch in batches:
                measured_reference.fill(batch, {**before, **live})
        with counter.phase("evaluation"):
            _evaluate(config, engine, batches[0])
        for update in range(updates):
            traced = profiled and update == updates - 1
            start = getattr(counter, "total", 0)
            tracer: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            with tracer if traced else nullcontext():
                highest = _counted_update(config, engine, batches, live, counter)
        with counter.phase("evaluation"):
            _evaluate(config, engine, batches[0])
        with counter.phase("save"), TemporaryDirectory() as folder:
            if config.tuning.whole_model:
                engine.save_state(Path(folder) / "state")
            else:
                Path(folder, "state").mkdir()
                save_trained(engine, config.tuning.kept, 1, Path(folder) / "state")
    if not on_gpu:
        start = counter.total
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as tracer_alone:
            _update(config, engine, batches, live)
        peak = start + _traced_peak(tracer_alone, BACKWARD)
        counter.peaks[BACKWARD] = min(peak, counter.peaks[BACKWARD])
    found = _found(counter, policy)
    if profiled:
        found["profiler"] = {"trace": _traced_peak(tracer), "counter": highest - start}
    return found


def _found(counter: Any, policy: Any) -> dict[str, Any]:
    """What a counter has, as plain values."""
    found: dict[str, Any] = {"phases": counter.peaks, "parameters": _sizes(policy)}
    if hasattr(counter, "reserved"):
        found["reserved"] = counter.reserved
    alive_at_peak = getattr(counter, "alive_at_peak", {})
    if alive_at_peak:
        found["alive"] = {
            phase: [[op, n, count] for (op, n), count in sorted(alive.items(), key=_weight)][:40]
            for phase, alive in alive_at_peak.items()
        }
    return found


def _counted_update(
    config: RunConfig, engine: Any, batches: list[Batch], live: Mapping[str, Any], counter: Any
) -> int:
    """One step of the loop; the most bytes of it."""
    before = dict(counter.peaks)
    counter.peaks.clear()
    _update(config, engine, batches, live, counter.phase)
    highest = max(counter.peaks.values())
    for name, peak in before.items():
        counter.peaks[name] = max(peak, counter.peaks.get(name, 0))
    return highest  # type: ignore[no-any-return]


def _update(
    config: RunConfig,
    engine: Any,
    batches: list[Batch],
    live: Mapping[str, Any],
    phase: Callable[[str], AbstractContextManager[Any]] = record_function,
) -> None:
    """One step of the loop, phase by phase."""
    objective: Any = config.objective
    if live:
        with phase(REFERENCE):
            for batch in batches:
                measured_reference.fill(batch, live)
    counts = [objective.count(batch) for batch in batches]
    denominators = counts[0]._make([sum(values) for values in zip(*counts, strict=True)])
    engine.train(True)
    for i, batch in enumerate(batches):
        with phase("forward and loss"):
            loss = engine.forward(batch, objective, denominators)
        with phase(BACKWARD):
            engine.backward(loss.total, last=i == len(batches) - 1)
    with phase("optimizer step"):
        engine.step(1e-4)


@torch.no_grad()
def _start_up_checks(config: RunConfig, engine: Any, policy: Any, batch: Batch) -> None:
    engine.train(False)
    objective: Any = config.objective
    nothing = filler(objective).to(engine.device)
    count = objective.count(nothing)
    engine.forward(nothing, objective, count._make([1.0] * len(count)))
    probe = make_probe(_Probed(), own_rows=objective.own_rows)  # type: ignore[arg-type]
    policy.check_head(probe.to(engine.device))
    policy.check_parity(batch)


@torch.no_grad()
def _evaluate(config: RunConfig, engine: Any, batch: Batch) -> None:
    engine.train(False)
    count = config.objective.count(batch)
    engine.forward(batch, config.objective, count._make([1.0] * len(count)))


class _Probed(list[Example]):
    """Two samples, as a prepared split has them."""

    def __init__(self) -> None:
        super().__init__([_example(64, 1.0, 64, seed=9)] * 2)
        self.sample_ids = np.array([9, 9])


def _batch(lengths: Sequence[int], share: float, vocabulary: int, seed: int) -> Batch:
    examples = [_example(n, share, vocabulary, seed=seed + i) for i, n in enumerate(lengths)]
    return collate(examples)


def _units(
    lengths: Sequence[int], parents: Sequence[int], vocabulary: int, seed: int, own_rows: bool
) -> list[Example]:
    """Prompts and answers, each worth more than the one after it; every field of an answer."""
    found: list[Example] = []
    unit = -1
    for i, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        unit = i if parent < 0 else unit
        plain = _example(length, 1.0, vocabulary, seed=seed + i)
        weight_L = plain.weight_L * (parent >= 0)
        if own_rows:
            weight_L[:-1] = 0
        role, value = (-1, 0.0) if parent < 0 else (0, float(len(lengths) - i))
        found.append(
            replace(
                plain,
                weight_L=weight_L,
                channel=unit % NUM_CHANNELS,
                sample_id=i,
                parent=None if parent < 0 else parent,
                unit=unit,
                extra={"role_S": role, "value_S": value, "margin_S": 0.0},
            )
        )
    return found


def _example(length: int, share: float, vocabulary: int, seed: int) -> Example:
    """Random tokens, of which the last `share` is supervised."""
    ids_L = np.random.default_rng(seed).integers(0, vocabulary, length).astype(np.int32)
    weight_L = (np.arange(length) >= round(length * (1 - share))).astype(np.float32)
    return Example(ids_L, weight_L, channel=seed % NUM_CHANNELS, sample_id=seed)


def _sizes(policy: Any) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters())


def _weight(entry: tuple[tuple[str, int], int]) -> int:
    (_, num_bytes), count = entry
    return -num_bytes * count


def _traced_peak(traced: Any, phase: str = "") -> int:
    """The most bytes over the start, by the profiler's events of the allocator; of one phase."""
    events = traced.profiler.kineto_results.events()
    spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == phase]
    total = highest = 0
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    for time, num_bytes in sorted(changes, key=lambda change: change[0]):
        total += num_bytes
        if not phase or any(start <= time <= end for start, end in spans):
            highest = max(highest, total)
    return highest
