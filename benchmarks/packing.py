"""Packing side by side with TRL's `bfd`, and a plan of a million samples.

    pip install trl==1.16.0 && OMP_NUM_THREADS=1 python benchmarks/packing.py

Lengths are lognormal, exp(N(5.5, 1)) cut at 2048 tokens. Both pack the same lengths, in turn, in
one process. TRL packs a table of tokens, and moves them; given here are tokens of one byte, so
that nearly all of its time goes into the plan. Without trl, only our own figures are made.
Writes a row to benchmarks/results/packing.jsonl.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import rows

from posttrain_dist.data.packs.balance import Cost, assign_packs
from posttrain_dist.data.packs.packing import plan_epoch

MAX_LENGTH, WINDOW = 2048, 4096
ROUNDS = 7


def lognormal(num: int) -> npt.NDArray[np.int32]:
    """Lengths of conversations."""
    draw = np.random.default_rng(0).normal(5.5, 1, num)
    return np.clip(np.exp(draw).astype(np.int32), 1, MAX_LENGTH)


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def fill(lengths: npt.NDArray[np.int32], packs: int) -> float:
    """Share of the packs' tokens that is real."""
    return float(lengths.sum(dtype=np.int64)) / (packs * MAX_LENGTH)


def ours(lengths: npt.NDArray[np.int32], epoch: int = 0, window: int = WINDOW) -> int:
    """Plan one epoch; returns how many packs it has."""
    return len(plan_epoch(lengths, MAX_LENGTH, window, 0, epoch))


def against_trl(num: int) -> dict[str, Any]:
    """Median times of both over the same lengths, in turn, and the ratio of each round."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    lengths = lognormal(num)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int8)))
    table = pa.table({"input_ids": tokens})
    runs: dict[str, Callable[[], int]] = {
        "trl": lambda: len(_pack_bfd(table, MAX_LENGTH)),
        "ours": partial(ours, lengths),
        "ours_one_window": partial(ours, lengths, window=num),  # as TRL packs: the same problem
    }
    packs = {name: run() for name, run in runs.items()}
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(ROUNDS)]
    return {
        "samples": num,
        "seconds": {name: statistics.median(r[name] for r in rounds) for name in runs},
        "fill": {name: fill(lengths, packs[name]) for name in runs},
        "times_faster": {
            name: statistics.median(r["trl"] / r[name] for r in rounds)
            for name in ("ours", "ours_one_window")
        },
    }


def a_million() -> dict[str, Any]:
    """Time and fill of one epoch of a million samples, each round another epoch."""
    lengths = lognormal(1_000_000)
    times, cpu = [], []
    for epoch in range(ROUNDS):
        start = time.process_time()
        times.append(seconds(partial(ours, lengths, epoch)))
        cpu.append(time.process_time() - start)
    fills = {w: fill(lengths, ours(lengths, 0, w)) for w in (1024, 2048, 4096, 8192)}
    plan = plan_epoch(lengths, MAX_LENGTH, WINDOW, 0, 0)
    return {
        "samples": len(lengths),
        "first_s": times[0],
        "median_s": statistics.median(times),
        "best_s": min(times),
        "median_cpu_s": statistics.median(cpu),  # on a machine shared with others
        "best_cpu_s": min(cpu),
        "fill_by_window": fills,
        "plan_bytes": plan.order.nbytes + plan.offsets.nbytes,
    }


def eight_ranks() -> dict[str, float]:
    """Cost of the most expensive of 8 ranks over the mean, packs of 64 a step, all steps."""
    lengths = lognormal(200_000)
    share = np.random.default_rng(1).uniform(0.05, 0.95, len(lengths))  # supervised
    cost = Cost().of(lengths, (lengths * share).astype(np.int32))
    plan = plan_epoch(lengths, MAX_LENGTH, WINDOW, 0, 0)
    packs = np.add.reduceat(cost[plan.order], plan.offsets[:-1])
    steps = packs[: len(packs) // 64 * 64].reshape(-1, 64)
    assigned = [np.array([step[rank].sum() for rank in assign_packs(step, 8)]) for step in steps]
    in_turn = [step.reshape(8, 8).sum(axis=0) for step in steps]
    result: dict[str, float] = {}
    for name, totals in (("dealt", assigned), ("in_turn", in_turn)):
        ratios = [total.max() / total.mean() for total in totals]
        result |= {f"{name}_mean": float(np.mean(ratios)), f"{name}_worst": max(map(float, ratios))}
    return result


def main() -> None:
    """Measure, print, and append one row."""
    row: dict[str, Any] = {
        **rows.facts(("numpy", "trl", "pyarrow")),
        "max_length": MAX_LENGTH,
        "window": WINDOW,
        "million": a_million(),
        "ranks": eight_ranks(),
    }
    if row["versions"]["trl"] != "-":
        row["against_trl"] = against_trl(50_000)
    print(json.dumps(row, indent=1))
    rows.append("packing", [row])


if __name__ == "__main__":
    main()
