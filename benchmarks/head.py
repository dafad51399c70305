"""The output head side by side: ours, torch eager, torch.compile, F.linear_cross_entropy, TRL, ...

    pip install trl==1.16.0 && python benchmarks/head.py --rows 1024 --masks 0 0.75 0.9

Forward and backward of one head, all arms and all masks in turn in one process, and the matrix
products alone (the floor) among them; then each arm once in a process of its own for its peak
memory, at the first mask. Inputs, arms and what is checked of them: head_arms.py. Peers that are
not installed, or do not run on this device, are named with the reason. One row per arm and mask
goes to benchmarks/results/head.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rows
import torch
from head_arms import ARMS, Arm, Problem, Skip, Truth, make_floor, make_problem, mask

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
SMOKE = {"rows": 64, "hidden": 32, "vocabulary": 256, "rounds": 1}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="N, supervised or not")
    parser.add_argument("--hidden", type=int, default=1024, help="D")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="V")
    parser.add_argument("--masks", type=float, nargs="+", default=[0.0, 0.75, 0.9])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frozen", action="store_true", help="no gradient for the weight")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120, help="no round begins after")
    parser.add_argument("--memory-masks", type=float, nargs="*", help="default: the first mask")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, to see that it runs")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # this process measures one arm's peak
    arguments = parser.parse_args()
    if arguments.memory_masks is None:
        arguments.memory_masks = arguments.masks[:1]
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    return arguments


def problem_of(arguments: argparse.Namespace, rows_: int | None = None) -> Problem:
    """The unmasked problem that the command line asks for."""
    return make_problem(
        rows_ or arguments.rows,
        arguments.hidden,
        arguments.vocabulary,
        trainable=not arguments.frozen,
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
    )


def usable(names: list[str]) -> tuple[dict[str, Arm], dict[str, str]]:
    """Arms that run here, and the reason for each that does not."""
    arms, skipped = {}, {}
    for name in names:
        try:
            arms[name] = ARMS[name]()
        except Skip as reason:
            skipped[name] = str(reason)
    return arms, skipped


def once(arm: Arm, problem: Problem) -> Callable[[], torch.Tensor]:
    """A call that leaves no gradient of the call before."""

    def run() -> torch.Tensor:
        problem.clear()
        return arm(problem)

    return run


def checked(arms: dict[str, Arm], problem: Problem) -> dict[str, dict[str, Any]]:
    """Each arm's loss and gradients against float32 truth; an arm that fails says how."""
    truth = Truth.of(problem)
    found: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        try:
            found[name] = truth.errors(once(arm, problem)(), problem)
        except Exception as error:  # a peer's failure is a result
            if name.startswith("ours"):
                raise
            found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    problem.clear()
    return found


def peak_of(arguments: argparse.Namespace) -> None:
    """Print the peak memory of one arm over what its inputs take; runs in a fresh process.

    The arm runs once on a small problem before, so that libraries, threads and their buffers are
    there at the start.
    """
    arm = ARMS[arguments.peak_of]()
    share = arguments.masks[0]
    once(arm, mask(problem_of(arguments, rows_=min(64, arguments.rows)), share))()
    problem = mask(problem_of(arguments), share)
    with rows.Peak() as peak:
        arm(problem)
    print(json.dumps(peaks(peak.over_start_bytes, problem)))


def peaks(over_inputs_bytes: int, problem: Problem) -> dict[str, int]:
    """Memory over the inputs, and what of it is neither of the gradients that were asked for."""
    extra = over_inputs_bytes - problem.gradient_bytes
    return {"peak_over_inputs_bytes": over_inputs_bytes, "peak_extra_bytes": extra}


def peak_on_gpu(arm: Arm, problem: Problem) -> dict[str, int]:
    """The same on a GPU, whose allocator counts every byte: no process of its own is needed."""
    problem.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    arm(problem)
    return peaks(torch.cuda.max_memory_allocated() - start, problem)


def memory(arguments: argparse.Namespace, name: str, share: float) -> dict[str, Any]:
    """What `peak_of` prints of one arm."""
    given = [
        *(f"--{n}={getattr(arguments, n)}" for n in ("rows", "hidden", "vocabulary")),
        *(f"--{n}={getattr(arguments, n)}" for n in ("dtype", "device")),
        *(["--frozen"] if arguments.frozen else []),
        f"--masks={share}",
        f"--peak-of={name}",
    ]
    try:
        return rows.fresh_process([__file__, *given])
    except RuntimeError as error:
        return {"peak_failed": str(error).splitlines()[-1]}


def measure(arguments: argparse.Namespace, until: float | None = None) -> list[dict[str, Any]]:
    """All rows of one command; `until`: `time.monotonic()` after which no round begins."""
    arms, skipped = usable(arguments.arms)
    on_gpu = arguments.device != "cpu"
    whole = problem_of(arguments)
    problems = {share: mask(whole, share) for share in arguments.masks}
    checks = {share: checked(arms, problem) for share, problem in problems.items()}
    turns: dict[tuple[str, float], Callable[[], Any]] = {}
    for share, problem in problems.items():
        turns["floor", share] = make_floor(problem)
        for name, arm in arms.items():
            if "failed" not in checks[share][name]:
                turns[name, share] = once(arm, problem)
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    # The check was the warm-up.
    taken = rows.take_turns(turns, rounds=arguments.rounds, warmup=0, wait=wait, until=until)
    whole.clear()
    turns.clear()
    table = []
    for share in arguments.masks:
        for name in ("floor", *arguments.arms):
            row = {**case_of(arguments, share), "arm": name, **checks[share].get(name, {})}
            if name in skipped:
                row["skipped"] = skipped[name]
            if (name, share) in taken:
                row |= figures(taken, name, share, arguments.rows)
                if name != "floor" and share in arguments.memory_masks:
                    row |= (
                        peak_on_gpu(arms[name], problems[share])
                        if on_gpu
                        else memory(arguments, name, share)
                    )
            table.append(row)
    compare_memory(table)
    return table


def compare_memory(table: list[dict[str, Any]]) -> None:
    """Add to each row its extra memory as a share of eager's at the same mask."""
    eager = {r["masked"]: r.get("peak_extra_bytes") for r in table if r["arm"] == "eager"}
    for row in table:
        if "peak_extra_bytes" in row and eager.get(row["masked"]):
            row["share_of_eager_memory"] = row["peak_extra_bytes"] / eager[row["masked"]]


def case_of(arguments: argparse.Namespace, share: float) -> dict[str, Any]:
    """What was measured."""
    return {
        "rows": arguments.rows,
        "hidden": arguments.hidden,
        "vocabulary": arguments.vocabulary,
        "masked": share,
        "head": "frozen" if arguments.frozen else "trainable",
        "dtype": arguments.dtype,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "seed": 0,
    }


def figures(
    taken: dict[tuple[str, float], list[float]], name: str, share: float, num_rows: int
) -> dict[str, Any]:
    """Quantiles and, round by round, ratios to ours, to the floor and to the first mask."""
    own = taken[name, share]
    first = next(other for arm, other in taken if arm == name)
    found: dict[str, Any] = rows.quantiles(own)
    found["rows_per_s"] = num_rows / found["p50_s"]
    found["share_of_floor"] = rows.times_faster(taken["floor", share], own)
    found["cost_of_first_mask"] = rows.times_faster(own, taken[name, first])
    if ("ours", share) in taken:
        found["ours_times_faster"] = rows.times_faster(own, taken["ours", share])
    return found


def show(table: list[dict[str, Any]]) -> None:
    """Print one line a row."""
    for row in table:
        head = f"{row['masked']:5} {row['head']:9} {row['arm']:32}"
        if "p50_s" not in row:
            print(head, row.get("skipped", row.get("failed")))
            continue
        print(
            head,
            f"{row['p50_s'] * 1e3:9.1f} ms",
            f"{row['share_of_floor']:5.2f} of floor",
            f"ours {row.get('ours_times_faster', float('nan')):6.2f} x",
            f"{row.get('peak_extra_bytes', 0) / 2**20:8.0f} MiB",
            f"error {row.get('gradient_error', 0):.1e}",
            f"loss {row.get('loss', 0):.3f}",
        )


def main() -> None:
    arguments = parse()
    warnings.filterwarnings("ignore")
    if arguments.peak_of:
        peak_of(arguments)
        return
    table = measure(arguments, until=time.monotonic() + arguments.seconds)
    show(table)
    rows.append("head", [{**rows.facts(PACKAGES), **row} for row in table], arguments.results)


if __name__ == "__main__":
    main()
