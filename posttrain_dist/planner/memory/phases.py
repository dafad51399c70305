"""What one rank allocates on its device, phase by phase: a whole run, replayed on one ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from posttrain_dist.engine import Single
from posttrain_dist.models.architectures.known import KEEPS_ROWS
from posttrain_dist.objectives.reference_choice import Reference
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.make_job import cpu_multiplies_bfloat16
from posttrain_dist.planner.memory.adapters.rows import embedded_row, extended
from posttrain_dist.planner.memory.allocator import room_bytes
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.engines.base import EngineMemory
from posttrain_dist.planner.memory.engines.one_process import SingleMemory
from posttrain_dist.planner.memory.engines.zero import zero_memory
from posttrain_dist.planner.memory.layers.ends import (
    batch_bytes,
    causal_buffer_bytes,
    embed,
    num_targets,
    per_layer_inputs,
    rotary,
)
from posttrain_dist.planner.memory.layers.features import features_of
from posttrain_dist.planner.memory.layers.layer import run_layer, window_of
from posttrain_dist.planner.memory.layers.output_head import head_logprob, head_loss, head_score
from posttrain_dist.planner.memory.layers.parts import norm
from posttrain_dist.planner.memory.layers.repeated import run_layers
from posttrain_dist.planner.memory.ledger import Ledger
from posttrain_dist.planner.memory.operations import WIDE, dropout, scale, take_rows
from posttrain_dist.planner.memory.parameters import trained_parameters
from posttrain_dist.planner.memory.startup import check_parity
from posttrain_dist.planner.objective.objective_facts import HeadKind
from posttrain_dist.planner.objective.reference_passes import reference_job, second_model_bytes
from posttrain_dist.planner.plan import Item, Phase, PhaseName

if TYPE_CHECKING:
    from posttrain_dist.planner.memory.packed_rows import PackedRow

# Micro-batches of the updates that are replayed. The first update makes the moments; in the second
# they are there before the forward, and from its second micro-batch on gradients are, too.
_UPDATES = (1, 2)


@lru_cache(maxsize=8)
def device_phases(job: Job) -> tuple[Phase, ...]:
    """The fullest moment of each phase, in the order of a run, with the row that takes most."""
    jobs = [_with_found(job, row) for row in job.found_rows] or [job]
    return max((_phases_of_row(each, heldout=job) for each in jobs), key=_peak)


def _with_found(job: Job, row: PackedRow) -> Job:
    share = min(1.0, row.supervised / sum(row.lengths))
    return replace(job.with_row(row.lengths, row.parents), supervised_share=share)


def _peak(phases: tuple[Phase, ...]) -> int:
    return max(phase.allocated_bytes for phase in phases)


def _phases_of_row(job: Job, heldout: Job) -> tuple[Phase, ...]:
    """Of a run on the row of `job`; held-out samples may be longer than any of it."""
    job, heldout = extended(job), extended(heldout)
    ledger = Ledger(room_bytes(job))
    engine = make_engine_memory(job, ledger)
    trained = frozenset(each.name for each in trained_parameters(job))
    run, evaluation = (_Run(each, ledger, engine, trained) for each in (job, heldout))
    with ledger.phase(PhaseName.load):
        engine.load()
        ledger.allocate(Item.weights, causal_buffer_bytes(job))
        ledger.allocate(Item.workspace, _cublas_bytes(job))
        if job.objective.reference is Reference.frozen:
            ledger.allocate(Item.reference_model, second_model_bytes(job))
        run.check()
    passes = _reference_passes(job, ledger, run)
    if job.objective.precomputes:
        with ledger.phase(PhaseName.reference):
            copy = ledger.allocate(Item.reference_model, second_model_bytes(job))
            for each in passes:
                each.evaluate(PhaseName.reference)
            ledger.release(copy)
        passes = [run] if job.objective.old_logprob else []
    if job.evaluates:
        evaluation.evaluate()
    for most in _UPDATES:
        run.update(min(most, job.accumulation), passes)
    if job.evaluates:
        evaluation.evaluate()
    with ledger.phase(PhaseName.save):
        engine.save()
    with ledger.phase(PhaseName.export):
        engine.export()
    return ledger.phases()


def _reference_passes(job: Job, ledger: Ledger, run: _Run) -> list[_Run]:
    """The models that fill fields of a batch before its loss."""
    found = [run] if job.objective.policy_passes or job.objective.precomputes else []
    other = reference_job(job) if job.objective.has_second_model else None
    if other is None:
        return found
    second = _Run(extended(other), ledger, SingleMemory(other, ledger), frozenset())
    return [*(found if job.objective.old_logprob else []), second]


def state_bytes(job: Job) -> int:
    """What a run takes of its device at least, however short its rows: weights, optimizer state.

    The same replay, of loading and of an update without a batch before it.
    """
    ledger = Ledger(room_bytes(job))
    engine = make_engine_memory(job, ledger)
    with ledger.phase(PhaseName.load):
        engine.load()
        if job.objective.reference is Reference.frozen:
            ledger.allocate(Item.reference_model, second_model_bytes(job))
    with ledger.phase(PhaseName.update):
        engine.update()
    return max(phase.allocated_bytes for phase in ledger.phases())


def make_engine_memory(job: Job, ledger: Ledger) -> EngineMemory:
    """The memory of the engine of a job."""
    if isinstance(job.engine, Single):
        return SingleMemory(job, ledger)
    return zero_memory(job, ledger)


def _cublas_bytes(job: Job) -> int:
    """Workspaces of cuBLAS, one of the thread of forward and one of backward's.

    `getChosenWorkspaceSize` of torch (aten/src/ATen/cuda/CublasHandlePool.cpp): 32 MiB from Hopper
    on, else two of 4 MiB and eight of 16 KiB.
    """
    gpu = job.machine.gpu
    if gpu is None:
        return 0
    newer = gpu.startswith(("h", "gh", "b", "gb"))
    return 2 * (32 << 20 if newer else (2 * 4096 + 8 * 16) << 10)


class _Run:
    """Forward and backward of one row, as the policy runs it."""

    def __init__(
        self, job: Job, ledger: Ledger, engine: EngineMemory, trained: frozenset[str]
    ) -> None:
        self._job, self._ledger, self._engine, self._trained = job, ledger, engine, trained
        self._trained_of_layers = _by_layer(job, trained)

    def update(self, num_batches: int, passes: Sequence[_Run] = ()) -> None:
        """Micro-batches of an update, and the optimizer step.

        Args:
            passes: of models that fill fields of each micro-batch before them.
        """
        job, ledger = self._job, self._ledger
        # Those of this update, and of the next one, which is fetched meanwhile.
        batches = ledger.allocate(Item.batch, 2 * job.accumulation * batch_bytes(job))
        for each in passes:
            each.evaluate(PhaseName.reference)
        for i in range(num_batches):
            last = i == num_batches - 1
            graph = self._graph(recording=True)
            with ledger.phase(PhaseName.forward):
                loss = self._forward(graph)
            with ledger.phase(PhaseName.backward):
                self._engine.before_backward(last=last)
                graph.backward(loss)
                graph.kept.clear()
                graph.per_layer_inputs = None
                self._engine.after_backward(last=last)
        with ledger.phase(PhaseName.update):
            self._engine.update()
        ledger.release(batches)

    def evaluate(self, phase: PhaseName = PhaseName.evaluate) -> None:
        """One row without gradients."""
        with self._ledger.phase(phase):
            batch = self._ledger.allocate(Item.batch, batch_bytes(self._job))
            self._forward(self._graph(recording=False))
            self._ledger.release(batch)

    def check(self) -> None:
        """The head beside its reference, before the first step."""
        if self._job.objective.head is HeadKind.score:
            return  # no fused operation
        graph = self._graph(recording=False)
        hidden = self._backbone(graph, num_targets(self._job))
        graph.kept.clear()
        check_parity(graph, self._job, self._head_name, fast=self._multiplies_fast)
        graph.drop(hidden)

    def _graph(self, *, recording: bool) -> Graph:
        graph = Graph(
            self._ledger,
            self._engine,
            width=self._job.value_bytes,
            trained=self._trained,
            recording=recording,
        )
        graph.training = recording
        graph.drops = recording and not self._job.objective.no_dropout
        return graph

    def _forward(self, graph: Graph) -> Value:
        job = self._job
        num_rows = num_targets(job)
        hidden = self._backbone(graph, num_rows)
        hidden = graph.part(hidden, hidden.num_bytes)  # row 0 of the output
        name, fast = self._head_name, self._multiplies_fast
        if job.objective.head is HeadKind.score:
            return head_score(graph, hidden, name, num_rows)
        run = head_loss if job.objective.head is HeadKind.loss else head_logprob
        return run(graph, job, hidden, name, num_rows, fast=fast)

    @property
    def _head_name(self) -> str:
        network = self._job.network
        return network.before[0].name if network.shape.tied else network.head[0].name

    @property
    def _multiplies_fast(self) -> bool:
        return self._job.on_gpu or self._job.value_bytes == WIDE or cpu_multiplies_bfloat16()

    def _backbone(self, graph: Graph, num_rows: int) -> Value:
        """Embedding, layers, final norm: hidden states of the supervised rows."""
        job, network = self._job, self._job.network
        features = features_of(job)
        # Variables of the backbone, to its end: what the tables give.
        x = embedded_row(graph, job, embed(graph, network.before[0], job.row_tokens))
        tables = [graph.view(x)]
        if features.embedding_scale:
            x = scale(graph, x)
        if features.rotary:
            width = round(network.shape.head_dim * features.rotary)
            kept = tables if features.own_angles else graph.kept
            for _ in range(1 + features.two_rotations):
                kept += rotary(graph, job.row_tokens, width)
        else:  # positions that are learned
            tables.append(embed(graph, network.before[1], job.row_tokens))
            x = graph.add(x, tables[-1])
        if features.embedding_dropout:
            x = dropout(graph, x, on_gpu=job.on_gpu)
        if features.head_norms:  # NanoChat's has one in front of the layers, too
            x = norm(graph, x, "", network.shape.hidden_size, features)
        graph.per_layer_inputs = per_layer_inputs(graph, job, x)
        num_layers = len(network.layers)
        recomputed = [graph.recording and i < job.recomputed_layers for i in range(num_layers)]
        trained = self._trained_of_layers
        first = next((i for i, names in enumerate(trained) if names), num_layers)
        kinds = [  # behind the first layer that is trained there are gradients
            (
                id(layer),
                window_of(job, i),
                recomputed[i],
                i == num_layers - 1,
                trained[i],
                i > first,
            )
            for i, layer in enumerate(network.layers)
        ]

        def run(index: int, value: Value) -> Value:
            rows = num_rows if index == num_layers - 1 else None
            return self._layer(graph, index, value, rows, recomputed=recomputed[index])

        start = [x]
        del x  # so that it goes as soon as a layer does not need it
        x = run_layers(graph, start.pop(), kinds, recomputed, run, network.layers_name)
        if not graph.recording:
            graph.per_layer_inputs = None
        if features.weightless or network.after:
            final = "" if features.weightless else network.after[0].name
            x = norm(graph, x, final, network.shape.hidden_size, features)
        if network.shape.model_type in KEEPS_ROWS:
            x = take_rows(graph, x, num_rows * network.shape.hidden_size * x.width)
        return x

    def _layer(
        self, graph: Graph, index: int, x: Value, supervised: int | None, *, recomputed: bool
    ) -> Value:
        job = self._job
        has_gradients = x.needs_grad or graph.prefix is not None or self._trained_of_layers[index]
        if not recomputed or not has_gradients:
            return run_layer(graph, job, index, x, supervised)
        return graph.checkpoint(
            lambda inner, value: run_layer(inner, job, index, value, supervised),
            x,
            offload=job.model.checkpoint_offload and job.on_gpu,
        )


def _by_layer(job: Job, names: Iterable[str]) -> list[frozenset[str]]:
    """Those of the parameters that belong to each layer, without what stands before."""
    found: list[set[str]] = [set() for _ in job.network.layers]
    for name in names:
        if name.startswith(f"{job.network.layers_name}."):
            index, _, rest = name.removeprefix(f"{job.network.layers_name}.").partition(".")
            found[int(index)].add(rest)
    return [frozenset(each) for each in found]
