"""A task of the preflight step, one on each node; the first one judges.

    python -m posttrain_launch.preflight.node_check RUN

Prints `preflight: error: NODE: ...` lines, which slurm/preflight.sh reads the bad nodes from.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain_dist.config import Hardware, RunConfig, Slurm
from posttrain_dist.config.devices import DEVICES
from posttrain_dist.errors import reason
from posttrain_dist.files import read_object, write_atomic
from posttrain_dist.planner.plan_file import read_plan
from posttrain_launch.lifecycle.exit_codes import Exit
from posttrain_launch.preflight.judge import Expected, Finding, judge, judge_all_reduce
from posttrain_launch.preflight.meeting import LEAVE, Guest, Meeting, NotSeen, joined
from posttrain_launch.preflight.node_facts import (
    NodeFacts,
    folder_of,
    look,
    read_facts,
    write_facts,
)

_POLL_S = 0.05
_ALL_REDUCE_S = 60.0  # at most; importing torch on a cold file system may take half of it


@dataclass(frozen=True, slots=True)
class Task:
    """This task among those of the step."""

    run: Path
    node: str
    rank: int
    nodes: list[str]
    start: str  # of the job: "<id>.<restarts>"
    address: str  # of the first node
    deadline_s: float
    began: float  # of time.monotonic

    @property
    def deadline(self) -> float:
        """When all must be done, of time.monotonic."""
        return self.began + self.deadline_s

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return max(1.0, self.deadline - time.monotonic())


def main(run: Path) -> int:
    """Look at this node, and at the first one judge all; 0, or 1 where something is wrong."""
    task = _task(run)
    try:
        folder_of(run).mkdir(parents=True, exist_ok=True)
        facts = look(run, task.node, task.start)
        if task.rank == 0:
            facts = facts.replace(clock_s=0.0, round_trip_s=0.0)
        write_facts(run, facts)
    except OSError as error:
        what = f"cannot use the run folder {run}: {reason(error)}"
        fix = "set output_root to storage that all nodes see and can write to, with space left"
        print(Finding(task.node, what, fix).line(), flush=True)
        return Exit.failed
    return _judged(task, facts) if task.rank == 0 else _watched(task, facts)


def _task(run: Path) -> Task:
    env = os.environ
    return Task(
        run=run,
        node=env["SLURMD_NODENAME"],
        rank=int(env["SLURM_PROCID"]),
        nodes=env["POSTTRAIN_NODES"].split(),
        start=f"{env['SLURM_JOB_ID']}.{env.get('SLURM_RESTART_COUNT', '0')}",
        address=env["POSTTRAIN_HEAD_ADDRESS"],
        deadline_s=float(env["POSTTRAIN_PREFLIGHT_DEADLINE"]),
        began=time.monotonic(),
    )


# ------------------------------------------------------------------------------ the other nodes


def _watched(task: Task, facts: NodeFacts) -> int:
    try:
        with joined(task.run, task.start, task.deadline) as first:
            clock = first.clock()
            facts = facts.replace(clock_s=clock.ahead_s, round_trip_s=clock.round_trip_s)
            write_facts(task.run, facts)
            return _take_part(task, facts, first)
    except NotSeen:
        what = f"does not see what {task.nodes[0]} writes to {folder_of(task.run)}"
        fix = "set output_root to storage that all nodes share, or leave the node out: "
        print(Finding(task.node, what, fix + "cluster.exclude=[{node}]").line(), flush=True)
        return Exit.failed
    except OSError as error:
        write_facts(task.run, facts.replace(unreachable=reason(error)))
        return 0  # the first node says so


def _take_part(task: Task, facts: NodeFacts, first: Guest) -> int:
    verdict = first.say("verdict")
    if verdict == LEAVE:
        return 0
    from posttrain_launch.preflight.all_reduce import join_store, measure

    _, port, device = verdict.split()
    seconds = min(task.left_s, _ALL_REDUCE_S)
    try:
        store = join_store(task.address, int(port), len(task.nodes), seconds)
    except Exception as error:  # of torch: DistNetworkError and its kin
        text = str(error).splitlines()[0][:300]
        write_facts(task.run, facts.replace(all_reduce_error=text))
        return 0
    outcome = measure(store, task.rank, len(task.nodes), on_gpu=device == "gpu", timeout_s=seconds)
    values = {"all_reduce_gb_s": outcome.gb_s, "all_reduce_error": outcome.error}
    write_facts(task.run, facts.replace(**values))
    return 0


# ------------------------------------------------------------------------------ the first node


def _judged(task: Task, facts: NodeFacts) -> int:
    if len(task.nodes) == 1:
        known, found = {task.node: facts}, judge({task.node: facts}, _expected(task), 0.0)
        return _report(task, known, found)
    with Meeting(task.run, task.start, task.address) as meeting:
        known = _wait(task, lambda each: each.clock_s is not None or each.unreachable is not None)
        found = judge(known, expected := _expected(task), task.deadline_s)
        if not any(each.is_error for each in found):
            known = _sum_over_all(task, facts, meeting)
            found += judge_all_reduce(known, expected, min(task.deadline_s, _ALL_REDUCE_S))
        return _report(task, known, found)


def _sum_over_all(task: Task, facts: NodeFacts, meeting: Meeting) -> dict[str, NodeFacts]:
    from posttrain_launch.preflight.all_reduce import measure, open_store

    seconds = min(task.left_s, _ALL_REDUCE_S)
    store, port = open_store(task.address, len(task.nodes), seconds)
    on_gpu = bool(facts.gpus.gpus)
    meeting.decide(f"go {port} {'gpu' if on_gpu else 'cpu'}")
    outcome = measure(store, 0, len(task.nodes), on_gpu=on_gpu, timeout_s=seconds)
    values = {"all_reduce_gb_s": outcome.gb_s, "all_reduce_error": outcome.error}
    write_facts(task.run, facts.replace(**values))
    return _wait(
        task, lambda each: each.all_reduce_gb_s is not None or each.all_reduce_error is not None
    )


def _wait(task: Task, is_ready: Callable[[NodeFacts], bool]) -> dict[str, NodeFacts]:
    """What the nodes wrote, once all are ready or time is up."""
    while True:
        known = read_facts(task.run, task.start)
        if all(node in known and is_ready(known[node]) for node in task.nodes):
            return known
        if time.monotonic() >= task.deadline:
            return known
        time.sleep(_POLL_S)


def _expected(task: Task) -> Expected:
    config = RunConfig.from_yaml((task.run / "config.yaml").read_text(encoding="utf-8"))
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    plan = read_plan(task.run).get("plan") or {}
    return Expected(
        nodes=task.nodes,
        gpus_per_node=cluster.gpus_per_node or 0,
        gpu_memory_mib=_planned_memory(config.hardware),
        checkpoint_bytes=plan.get("checkpoint_bytes", 0),
        keep=config.checkpoint.keep,
        export_bytes=plan.get("export_bytes", 0),
        network_gb_s=config.hardware.network_gb_s,
        submitted=read_object(task.run / "run.json").get("versions", {}),
    )


def _planned_memory(hardware: Hardware) -> float | None:
    """MiB of each GPU that a plan counts with; None: nothing says it."""
    if hardware.gpu_memory_gib is not None:
        return hardware.gpu_memory_gib * 1024
    return DEVICES[hardware.gpu].memory_mib if hardware.gpu in DEVICES else None


def _report(task: Task, known: dict[str, NodeFacts], found: list[Finding]) -> int:
    for each in found:
        print(each.line(), flush=True)
    failed = any(each.is_error for each in found)
    seconds = time.monotonic() - task.began
    verdict = {"start": task.start, "passed": not failed, "seconds": round(seconds, 2)}
    verdict |= {"findings": [asdict(each) for each in found]}
    path = folder_of(task.run) / "verdict.json"
    write_atomic(path, json.dumps(verdict, indent=1) + "\n")
    if failed:
        return Exit.failed
    print(f"preflight: {_summary(task, known)}, in {seconds:.1f} s", flush=True)
    return 0


def _summary(task: Task, known: dict[str, NodeFacts]) -> str:
    facts = list(known.values())
    skew = max((abs(each.clock_s or 0.0) for each in facts), default=0.0)
    free = min(each.free_bytes for each in facts) / 2**30
    words = [
        f"{len(task.nodes)} nodes with {facts[0].gpus.count} GPUs each",
        f"{free:,.0f} GiB free",
    ]
    if len(facts) > 1:
        words.insert(1, "versions and config equal")
        words.append(f"clocks within {skew * 1000:.0f} ms")
    rates = [each.all_reduce_gb_s for each in facts if each.all_reduce_gb_s is not None]
    if rates:
        words.append(f"all-reduce {min(rates):.3g} GB/s")
    return ", ".join(words)


def _exit(code: int) -> None:
    """End without waiting for a thread that hangs in NCCL."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        exit_code = main(Path(sys.argv[1]))
    except Exception as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        node = os.environ.get("SLURMD_NODENAME", "?")
        print(f"preflight: error: {node}: the check failed: {text}", flush=True)
        exit_code = Exit.failed
    _exit(exit_code)
