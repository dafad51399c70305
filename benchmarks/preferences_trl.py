"""A DPO step side by side: ours, and TRL's DPOTrainer 1.16 as it is and at its best.

    pip install trl==1.16.0 && OMP_NUM_THREADS=1 python benchmarks/preferences_trl.py --kind mixed

Every arm is a process of its own (preferences_arms.py) that trains the same random Llama on the
same pairs, 8 a step, 70 % of a row its prompt; they take turns, step by step, and the first are not
timed. Tokens per second count real tokens with each prompt twice, as a peer reads them. The
reference costs a pass before step 1 (ours, and "reference before"), whose time by step is in
`with_pass_s`, or a forward in every step. One row an arm goes to results/preferences_trl.jsonl.

    --kind equal     256 tokens each: nothing to gain by packing, only by the prompt
    --kind mixed     lognormal lengths up to 1024
    --tune           every setting of TRL, few steps each; the best is TUNED
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import preferences_arms
import rows
from step import PACKAGES, Child
from step_data import TINY, Sizes

TUNED = "TRL 1 x 8, reference before, compiled"
DEFAULT = ("ours", "TRL default, float32", "TRL 8 x 1", "TRL 1 x 8, reference before", TUNED)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("equal", "mixed"), default="mixed")
    parser.add_argument("--arms", nargs="+", default=list(DEFAULT))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--seconds", type=float, default=540, help="no step begins after")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    arguments = parser.parse_args()
    if arguments.tune:
        arguments.arms = ["ours", *(n for n in preferences_arms.TRL if n != "TRL default")]
        arguments.steps = min(arguments.steps, arguments.warmup + 3)
    return arguments


def run(arguments: argparse.Namespace, folder: Path) -> list[Child]:
    """Let the arms take turns, step by step."""
    script = Path(preferences_arms.__file__)
    children = [Child(folder, arm, script) for arm in arguments.arms]
    try:
        for child in children:
            child.wait()
        until = time.monotonic() + arguments.seconds
        for _ in range(arguments.steps):
            for child in children:
                if time.monotonic() < until and not child.failed:
                    child.step()
                    print(child.last(), file=sys.stderr, flush=True)
    finally:
        for child in children:
            child.close()
    return children


def row_of(child: Child, own: Child, tokens: list[int], warmup: int) -> dict[str, Any]:
    """Figures of one arm; ratios step by step, each of the same pairs."""
    row: dict[str, Any] = {"arm": child.arm}
    if child.failed or len(child.steps) <= warmup:
        return row | {"failed": child.failed or "no timed step"}
    timed = [step["seconds"] for step in child.steps[warmup:]]
    row |= rows.quantiles(timed)
    pairs = list(zip(tokens[warmup:], timed, strict=False))
    row["tokens_per_s"] = statistics.median(count / seconds for count, seconds in pairs)
    row["cpu_s"] = statistics.median(step["cpu_s"] for step in child.steps[warmup:])
    row["peak_bytes"] = int(child.steps[-1]["peak_bytes"])
    row["losses"] = [step["loss"] for step in child.steps]
    if child.arm == "ours" or "before" in child.arm:
        row["pass_s"] = child.steps[0]["pass_s"]  # of all steps
    both = list(zip(child.steps, own.steps, strict=False))
    row["loss_difference"] = max(abs(a["loss"] - b["loss"]) for a, b in both)
    for key, name in (("seconds", "ours_times_faster"), ("cpu_s", "ours_times_less_cpu")):
        row[name] = statistics.median(a[key] / b[key] for a, b in both[warmup:])
    row["ours_share_of_memory"] = own.steps[-1]["peak_bytes"] / row["peak_bytes"]
    return row


def show(table: list[dict[str, Any]]) -> None:
    """Print one line a row."""
    for row in table:
        if "p50_s" not in row:
            print(f"{row['arm']:40} {row['failed']}")
            continue
        print(
            f"{row['arm']:40} {row['p50_s']:7.2f} s {row['tokens_per_s']:7.0f} tokens/s "
            f"{row['peak_bytes'] / 2**20:6.0f} MiB  ours {row['ours_times_faster']:5.2f} x "
            f"({row['ours_times_less_cpu']:.2f} x less CPU)  losses {row['loss_difference']:.1e}"
            f"  with_pass_s {row.get('with_pass_s', row['p50_s']):.2f}"
        )


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this is for processors
    arguments = parse()
    sizes = TINY if arguments.smoke else Sizes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = preferences_arms.write(folder, sizes, arguments.kind, arguments.steps)
        tokens = [preferences_arms.tokens_of(step) for step in preferences_arms.read(folder)]
        children = run(arguments, folder)
    own = children[0]
    table = [row_of(child, own, tokens, arguments.warmup) for child in children]
    for row in table:
        if "pass_s" in row:
            row["with_pass_s"] = row["p50_s"] + row["pass_s"] / arguments.steps
    show(table)
    case = {"kind": arguments.kind, "sizes": asdict(sizes), "seed": 0, **data}
    common = {**rows.facts(PACKAGES), **case}
    rows.append("preferences_trl", [{**common, **row} for row in table], arguments.results)


if __name__ == "__main__":
    main()
