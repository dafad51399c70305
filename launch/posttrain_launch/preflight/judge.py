"""What the facts of all nodes mean: which node is wrong, in one sentence, and what to do. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from posttrain_launch.preflight.gpu_state import Gpu
from posttrain_launch.preflight.node_facts import NodeFacts

SKEW_WARNING_S, SKEW_ERROR_S = 2.0, 60.0  # Slurm's own credentials allow 300 s
USED_SHARE = 0.1  # of a GPU's memory, that another process holds
PLANNED_SHARE = 0.9  # of the memory that was planned with: drivers differ in what they keep
BANDWIDTH_SHARE = 0.5  # of the expected one
# Ray's shared memory is 200 MB (ray_steps.sh); its sockets and logs are small.
SHARED_MEMORY_BYTES, TEMP_BYTES = 256 << 20, 1 << 30
_EXCLUDE = "or leave it out: cluster.exclude=[{node}]"


@dataclass(frozen=True, slots=True)
class Expected:
    """What the nodes of a run must be."""

    nodes: list[str]  # the first one is where the driver runs
    gpus_per_node: int
    gpu_memory_mib: float | None = None  # of each, that the run was planned with
    checkpoint_bytes: int = 0  # of one, all ranks together; 0: it was not planned
    keep: int = 0  # checkpoints that stay; 0: all
    export_bytes: int = 0
    network_gb_s: float | None = None
    submitted: dict[str, str] = field(default_factory=dict)  # versions where it was submitted


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with one node."""

    node: str
    what: str
    fix: str
    is_error: bool = True

    def line(self) -> str:
        """As it stands in the job's log."""
        return (
            f"preflight: {'error' if self.is_error else 'warning'}: {self.node}: {self.what}; "
            + (f"fix: {self.fix.format(node=self.node)}")
        )


def judge(facts: Mapping[str, NodeFacts], expected: Expected, deadline_s: float) -> list[Finding]:
    """Everything but the all-reduce.

    Args:
        facts: node -> what it wrote; a node that is missing wrote nothing in `deadline_s`.
    """
    found = list(_absent(facts, expected, deadline_s))
    if len(facts) > 1:
        found += _odd_ones(facts, expected)
    for node in expected.nodes:
        if node in facts:
            found += _gpu_findings(facts[node], expected)
            found += _space(facts[node], expected)
            found += _clock(facts[node], expected)
    found += _as_submitted(facts, expected)
    return found


def judge_all_reduce(
    facts: Mapping[str, NodeFacts], expected: Expected, deadline_s: float
) -> list[Finding]:
    """What the sum over all nodes showed."""
    network = "check the network between the nodes, and cluster.network_interface; " + _EXCLUDE
    found = []
    for node in expected.nodes:
        known = facts.get(node)
        if known is None or (known.all_reduce_gb_s is None and known.all_reduce_error is None):
            what = f"the all-reduce over all nodes did not end in {deadline_s:.0f} s"
            found.append(Finding(node, what, network))
        elif known.all_reduce_error is not None:
            what = f"the all-reduce over all nodes failed: {known.all_reduce_error}"
            found.append(Finding(node, what, network))
    rates = {n: f.all_reduce_gb_s for n, f in facts.items() if f.all_reduce_gb_s is not None}
    wanted = expected.network_gb_s
    if found or not rates or wanted is None:
        return found
    slowest = min(rates, key=lambda node: rates[node])
    if rates[slowest] < BANDWIDTH_SHARE * wanted:
        what = (
            f"an all-reduce over all nodes runs at {rates[slowest]:.3g} GB/s, and "
            f"hardware.network_gb_s is {wanted:g}"
        )
        fix = "check cluster.network_interface and NCCL's log (NCCL_DEBUG=INFO), or set "
        found.append(
            Finding(slowest, what, fix + "hardware.network_gb_s to what it is", is_error=False)
        )
    return found


def _absent(
    facts: Mapping[str, NodeFacts], expected: Expected, deadline_s: float
) -> Iterator[Finding]:
    head = expected.nodes[0]
    for node in expected.nodes:
        if node not in facts:
            what = f"wrote nothing to the run folder in {deadline_s:.0f} s that {head} sees"
            fix = "look whether it answers and sees the folder, or raise "
            yield Finding(node, what, fix + "cluster.preflight_deadline_s; " + _EXCLUDE)
        elif facts[node].unreachable:
            what = f"does not reach {head}: {facts[node].unreachable}"
            yield Finding(node, what, "check cluster.network_interface and firewalls; " + _EXCLUDE)


def _odd_ones(facts: Mapping[str, NodeFacts], expected: Expected) -> Iterator[Finding]:
    """Nodes that differ from most others; of two that differ, the second one."""
    present = [facts[node] for node in expected.nodes if node in facts]

    def most(value: Callable[[NodeFacts], str]) -> tuple[str, str]:
        counts = Counter(value(each) for each in present)
        best = max(counts.values())
        return next((value(f), f.node) for f in present if counts[value(f)] == best)

    usual, like = most(lambda f: f.config)
    for each in present:
        if each.config != usual:
            what = f"reads another config.yaml than {like}"
            fix = "the run folder must be the same storage on all nodes: set output_root; "
            yield Finding(each.node, what, fix + _EXCLUDE)
    for name in sorted({name for each in present for name in each.versions}):
        usual, like = most(lambda f, name=name: f.versions.get(name, "not installed"))  # type: ignore[misc]
        for each in present:
            here = each.versions.get(name, "not installed")
            if here != usual:
                fix = "give all nodes one environment (cluster.setup, cluster.container); "
                yield Finding(each.node, f"{name} is {here}, and {usual} on {like}", fix + _EXCLUDE)
    kinds = {f.node: f"{g.name}, {g.memory_mib} MiB" for f in present for g in f.gpus.gpus}
    if kinds:
        usual = Counter(kinds.values()).most_common(1)[0][0]
        for node, kind in kinds.items():
            if kind != usual:
                fix = "plan for the smaller one (hardware.*), or set cluster.gpu_type"
                what = f"has a GPU {kind}, and others have {usual}"
                yield Finding(node, what, fix, is_error=False)


def _gpu_findings(facts: NodeFacts, expected: Expected) -> Iterator[Finding]:
    state, node = facts.gpus, facts.node
    repair = "have its administrator look at it (nvidia-smi -q), " + _EXCLUDE
    if state.fault:
        yield Finding(node, f"nvidia-smi {_quote(state.fault)}", repair)
    elif state.count != expected.gpus_per_node:
        what = f"the job sees {state.count} GPUs, and cluster.gpus_per_node is "
        fix = "check nvidia-smi there, and how this site is asked for GPUs (cluster.gpu_request); "
        yield Finding(node, what + str(expected.gpus_per_node), fix + _EXCLUDE)
    planned = expected.gpu_memory_mib
    for gpu in state.gpus:
        if planned and gpu.memory_mib and gpu.memory_mib < PLANNED_SHARE * planned:
            what = (
                f"GPU {gpu.index} ({gpu.name}) has {gpu.memory_mib} MiB, and the run was planned "
            )
            fix = "set hardware to what the nodes are, or cluster.gpu_type or constraint; "
            yield Finding(node, f"{what}with {planned:.0f}", fix + _EXCLUDE)
        for fault in _faults(gpu):
            yield Finding(node, f"GPU {gpu.index} ({gpu.name}) {fault}", repair)
    if state.xids:
        what = f"the kernel's log has errors of its GPUs, the newest: {_quote(state.xids[-1])}"
        yield Finding(node, what, "if the run fails there: " + repair, is_error=False)


def _faults(gpu: Gpu) -> Iterator[str]:
    if gpu.memory_mib is None:
        yield "does not say its memory"
    elif gpu.used_mib is not None and gpu.used_mib > USED_SHARE * gpu.memory_mib:
        yield f"has {gpu.used_mib} of {gpu.memory_mib} MiB in use by another process"
    if gpu.uncorrected_ecc:
        yield f"counts {gpu.uncorrected_ecc} uncorrected ECC errors"
    if gpu.remap_failed:
        yield "could not replace a bad row of its memory"
    elif gpu.remap_pending:
        yield "waits for a reset to replace a bad row of its memory"


def _space(facts: NodeFacts, expected: Expected) -> Iterator[Finding]:
    node, free, one = facts.node, facts.free_bytes, expected.checkpoint_bytes
    where = "free space there, or set output_root to another disk"
    if free < one + expected.export_bytes:
        what = f"{_size(free)} are free for the run folder, and a checkpoint and the export take "
        yield Finding(node, what + _size(one + expected.export_bytes), where)
    elif expected.keep and free < one * (expected.keep + 1) + expected.export_bytes:
        need = one * (expected.keep + 1) + expected.export_bytes
        what = f"{_size(free)} are free for the run folder, and checkpoint.keep={expected.keep} "
        yield Finding(node, f"{what}takes up to {_size(need)}", where, is_error=False)
    for free, least, place in (
        (facts.shared_memory_bytes, SHARED_MEMORY_BYTES, "/dev/shm"),
        (facts.temp_free_bytes, TEMP_BYTES, "the folder of temporary files"),
    ):
        if free < least:
            what = f"{_size(free)} are free in {place}, and Ray wants {_size(least)}"
            yield Finding(node, what, f"free space there, {_EXCLUDE}", is_error=False)


def _clock(facts: NodeFacts, expected: Expected) -> Iterator[Finding]:
    if facts.clock_s is None:
        return
    skew = abs(facts.clock_s) - (facts.round_trip_s or 0.0) / 2
    if skew >= SKEW_WARNING_S:
        behind = "ahead of" if facts.clock_s > 0 else "behind"
        what = f"its clock is {abs(facts.clock_s):.1f} s {behind} that of {expected.nodes[0]}"
        fix = "have its administrator set it (chronyc tracking), " + _EXCLUDE
        yield Finding(facts.node, what, fix, is_error=skew >= SKEW_ERROR_S)


def _as_submitted(facts: Mapping[str, NodeFacts], expected: Expected) -> Iterator[Finding]:
    first = facts.get(expected.nodes[0])
    if first is None:
        return
    for name, there in expected.submitted.items():
        here = first.versions.get(name)
        if here is not None and here != there:
            what = f"{name} is {here}, and was {there} where the run was submitted"
            fix = "submit from the environment that the nodes have, if that is not meant"
            yield Finding(first.node, what, fix, is_error=False)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"


def _quote(text: str) -> str:
    """Text of another program inside of a `fix` template and of one line."""
    return " ".join(text.split()).replace("{", "(").replace("}", ")")
