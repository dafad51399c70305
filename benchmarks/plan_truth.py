"""Allocated memory, predicted by the planner beside measured: every arm a run in a fresh process.

    OMP_NUM_THREADS=1 python benchmarks/plan_truth.py             # all arms of this machine
    python benchmarks/plan_truth.py --arms llama "lora rank 8"    # some of them
    python benchmarks/plan_truth.py --list

On a GPU 12 configurations of billions of parameters, at most 8 minutes; on a CPU more than 40 small
ones, each with rows long enough that activations count, also on ranks of DeepSpeed, of which the
fullest is shown. Peaks are taken phase by phase
(`measured_memory.py`); rows go to benchmarks/results/plan_truth.jsonl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan_truth_arms as arms
import rows

PACKAGES = ("posttrain-dist", "torch", "transformers", "peft", "bitsandbytes", "deepspeed")
SECONDS = 480
IMPORTED = (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # ZeRO reads it: it brings torch's compiler
    "transformers.models.llama.modeling_llama",
    "peft",
)


def predict(arm: arms.Arm, folder: Path) -> dict[str, Any]:
    """Bytes of each phase by the planner, and items of the peak."""
    from posttrain_dist.planner.machine import find_machine
    from posttrain_dist.planner.make_job import make_job
    from posttrain_dist.planner.memory.phases import device_phases

    config = arms.config_of(arm, folder)
    job = replace(
        make_job(config, find_machine(config, plans_only=False)).with_row(
            arm.sample_tokens, arm.parents
        ),
        supervised_share=arm.targets / sum(arm.sample_tokens),
        accumulation=arm.accumulation,
        evaluates=True,
    )
    started = time.perf_counter()
    phases = device_phases(job)
    peak = max(phases, key=lambda phase: phase.allocated_bytes)
    return {
        "phases": {str(phase.name): phase.allocated_bytes + phase.if_room for phase in phases},
        "items": {str(item): n for item, n in peak.items.items()},
        "seconds": time.perf_counter() - started,
    }


def measure_here(arm: arms.Arm, folder: Path, **options: Any) -> dict[str, Any]:
    """The same run in this process, or what this rank of it has (`process=`)."""
    import measured_memory

    return measured_memory.measure(
        arms.config_of(arm, folder),
        arm.sample_tokens,
        parents=arm.parents,
        supervised_share=arm.supervised_share,
        accumulation=arm.accumulation,
        updates=arm.updates,
        **options,
    )


def compare(name: str, arm: arms.Arm | None = None) -> dict[str, Any]:
    """One row: an arm predicted here, and measured in a process of its own."""
    arm = arm or arms.ARMS[name]
    with tempfile.TemporaryDirectory() as folder:
        predicted = predict(arm, Path(folder))
        measured = measure_apart(arm, Path(folder))
    return {"arm": name, **row_of(predicted, measured)}


def measure_apart(arm: arms.Arm, folder: Path, **options: Any) -> dict[str, Any]:
    """`measure_here` in processes that have imported what they need, and nothing else.

    Returns:
        What the fullest rank found.

    Raises:
        RuntimeError: one failed.
    """
    from posttrain_dist.dist import _free_port

    context = multiprocessing.get_context("forkserver")
    # Of a GPU nothing may be touched before the fork.
    context.set_forkserver_preload(["measured_memory", *(() if arm.gpu else IMPORTED)])
    port, started = _free_port(), []
    for rank in range(arm.workers):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, rank, port, arm, folder, options)
        started.append((context.Process(target=_child, args=arguments, daemon=True), receiver))
        started[-1][0].start()
        sender.close()
    ranks: list[dict[str, Any]] = []
    try:
        for process, receiver in started:
            found = receiver.recv() if receiver.poll(SECONDS) else "no answer"
            if isinstance(found, str):
                raise RuntimeError(f"{arm}: {found}")
            ranks.append(found)
            process.join()
    except EOFError:
        raise RuntimeError(f"{arm}: the process ended") from None
    finally:
        for process, _ in started:
            process.kill()
    return fullest(ranks)


def fullest(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of what ranks measured, that with the highest peak."""
    return max(ranks, key=lambda rank: max(rank["phases"].values()))


def _child(
    sender: Any, rank: int, port: int, arm: arms.Arm, folder: Path, options: dict[str, Any]
) -> None:
    warnings.filterwarnings("ignore")
    try:
        sender.send(measure_rank(arm, folder, rank, port, **options))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def measure_rank(
    arm: arms.Arm, folder: Path, rank: int, port: int, **options: Any
) -> dict[str, Any]:
    """`measure_here` as one rank of the arm's workers, all of which call this."""
    from posttrain_dist import dist

    process = dist.Process(rank=rank, world=arm.workers, local_rank=rank, master_port=port)
    if arm.stage is None:
        return measure_here(arm, folder, process=process, **options)
    dist.start(process)
    found = measure_here(arm, folder, process=process, **options)
    dist.barrier()
    dist.stop()
    return found


def row_of(predicted: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Peaks over the phases that were measured, and their quotient less 1."""
    phases = measured["phases"]
    expected = {phase: predicted["phases"].get(phase, 0) for phase in phases}
    peak, found = max(expected.values()), max(phases.values())
    return {
        "predicted_bytes": peak,
        "measured_bytes": found,
        "error": peak / found - 1,
        "phase": max(phases, key=lambda phase: phases[phase]),
        "phases": {phase: [expected[phase], phases[phase]] for phase in phases},
        "items": predicted["items"],
        "plan_s": predicted["seconds"],
    }


def summary(table: list[dict[str, Any]]) -> dict[str, float]:
    """Of the errors: median and 95th percentile of their size, lowest and highest."""
    errors = sorted(row["error"] for row in table)
    sizes = sorted(map(abs, errors))
    return {
        "median": statistics.median(sizes),
        "p95": sizes[min(len(sizes) - 1, round(0.95 * len(sizes)))],
        "lowest": errors[0],
        "highest": errors[-1],
    }


def line(row: dict[str, Any]) -> str:
    """One arm, readable."""
    return (
        f"{row['arm']:34} predicted {row['predicted_bytes'] / 1e6:10.2f} MB  measured "
        f"{row['measured_bytes'] / 1e6:10.2f} MB  {row['error']:+8.3%}  in {row['phase']}"
    )


def main() -> None:
    """Measure what the command line asks for."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="*", choices=list(arms.ARMS), metavar="ARM")
    parser.add_argument("--list", action="store_true", help="the arms' names")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    given = parser.parse_args()
    chosen = given.arms or arms.of_this_machine()
    if given.list:
        print("\n".join(chosen))
        return
    end, table = time.monotonic() + SECONDS, []
    for name in chosen:
        if arms.ARMS[name].gpu and time.monotonic() > end:
            print(f"{name}: left out, the time is up", file=sys.stderr)
            continue
        table.append(compare(name))
        rows.append("plan_truth", [{**rows.facts(PACKAGES), **table[-1]}], given.results)
        print(line(table[-1]), flush=True)
    print(json.dumps(summary(table)))


if __name__ == "__main__":
    main()
