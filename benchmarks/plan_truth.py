"""Allocated memory, predicted by the planner beside measured: every arm a run in a fresh process.

    OMP_NUM_THREADS=1 python benchmarks/plan_truth.py             # all arms of this machine
    python benchmarks/plan_truth.py --arms llama "lora rank 8"    # some of them
    python benchmarks/plan_truth.py --list

On a GPU 12 configurations of billions of parameters, at most 8 minutes; on a CPU more than 40 small
ones, each with rows long enough that activations count. Peaks are taken phase by phase
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan_truth_arms as arms
import rows

PACKAGES = ("posttrain-dist", "torch", "transformers", "peft", "bitsandbytes", "deepspeed")
SECONDS = 480


def predict(arm: arms.Arm, folder: Path) -> dict[str, Any]:
    """Bytes of each phase by the planner, and items of the peak."""
    from posttrain_dist.planner.machine import find_machine
    from posttrain_dist.planner.make_job import make_job
    from posttrain_dist.planner.memory.phases import device_phases

    config = arms.config_of(arm, folder)
    job = replace(
        make_job(config, find_machine(config, plans_only=False)),
        row_tokens=sum(arm.sample_tokens),
        sample_tokens=max(arm.sample_tokens),
        supervised_share=arm.supervised_share,
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
    """The same run in this process."""
    import measured_memory

    return measured_memory.measure(
        arms.config_of(arm, folder),
        arm.sample_tokens,
        supervised_share=arm.supervised_share,
        accumulation=arm.accumulation,
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
    """`measure_here` in a process that has imported what it needs, and nothing else.

    Raises:
        RuntimeError: it failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["measured_memory"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, arm, folder, options))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = "the process ended"
    process.join()
    if isinstance(found, str):
        raise RuntimeError(f"{arm}: {found}")
    measured: dict[str, Any] = found
    return measured


def _child(sender: Any, arm: arms.Arm, folder: Path, options: dict[str, Any]) -> None:
    warnings.filterwarnings("ignore")
    try:
        sender.send(measure_here(arm, folder, **options))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


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
