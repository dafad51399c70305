"""The whole training step side by side: ours, TRL's SFTTrainer 1.16 as it is and tuned.

    pip install trl==1.16.0 && python benchmarks/step.py --kind mixed

Every arm is a process of its own (step_arms.py) that trains the same random Llama on the same
samples per optimizer step. The arms take turns: step 1 of each, step 2 of each, ... The first
steps are not timed. Losses and gradient norms of every step are held against a plain float32 loop.
Tokens per second count real tokens, no padding. One row per arm goes to
benchmarks/results/step.jsonl.

    --kind mixed     lognormal lengths up to 1024, 70 % masked
    --kind uniform   256 tokens each, none masked: nothing to gain by packing or masking
    --as-it-is       ours and SFTTrainer with nothing changed, two steps: its bfloat16 is slow here
    --tune           the settings of TRL that were tried, few steps each; the best is TUNED
    --channels       ours with and without the metrics of 8 channels
    --profile        where the time of our own step goes
    --floor          ours beside its matrix products alone, in each dtype that is fast here
    --memory         ours in bfloat16 beside float32, fast here or not: what each needs
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rows
import step_arms
import step_data
import torch
from step_data import TINY, Sizes

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")
TUNED = "TRL 1 x 8, compiled"  # the best of --tune on two AVX2 cores, mixed and uniform
PARTS = ("as_it_is", "tune", "channels", "profile", "floor", "memory")  # else "step"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("mixed", "uniform"), default="mixed")
    parser.add_argument("--arms", nargs="+", choices=list(step_arms.names()))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--seconds", type=float, default=600, help="no step begins after")
    for part in PARTS:
        parser.add_argument(f"--{part.replace('_', '-')}", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    arguments = parser.parse_args()
    if arguments.as_it_is:
        arguments.steps, arguments.warmup = 2, 1
    if arguments.tune or arguments.memory:
        arguments.steps = min(arguments.steps, arguments.warmup + 4)
    arguments.arms = arguments.arms or list(default_arms(arguments))
    return arguments


def default_arms(arguments: argparse.Namespace) -> list[str]:
    """What one command compares."""
    if arguments.tune:
        return ["reference", *(name for name in step_arms.TRL if "default" not in name)]
    if arguments.channels:
        return ["ours", "ours, no channels", "ours again"]
    if arguments.as_it_is:
        return ["ours", "TRL default"]
    if arguments.floor:
        from posttrain_kernels import multiplies_fast

        dtypes = [d for d in step_arms.FLOOR_DTYPES if multiplies_fast(getattr(torch, d))]
        return [f"{arm}, {dtype}" for dtype in dtypes for arm in ("ours", "products")]
    if arguments.memory:
        return ["ours, float32", "ours, bfloat16"]
    return ["reference", "ours", "ours, compiled", "TRL default, float32", "TRL 1 x 8", TUNED]


class Child:
    """One arm's process; `step` runs one optimizer step of it and waits.

    Args:
        script: whose arms they are; null: those of step_arms.py.
    """

    def __init__(self, folder: Path, arm: str, script: Path | None = None) -> None:
        self.arm = arm
        self.steps: list[dict[str, float]] = []
        self.failed = ""
        self._errors = (folder / f"{arm}.stderr").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, str(script or Path(step_arms.__file__)), str(folder), arm],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
        )

    def wait(self) -> None:
        """Until the model is loaded and no step has begun."""
        self._read()

    def step(self) -> None:
        """Run one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = self._read()
        if line is not None:
            self.steps.append(line)

    def last(self) -> str:
        """How its last step went."""
        if self.failed:
            return f"{self.arm}: {self.failed}"
        now = self.steps[-1]
        return f"{self.arm}: {now['seconds']:.2f} s, loss {now['loss']:.4f}"

    def _read(self) -> dict[str, float] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            read: dict[str, float] = json.loads(line)
            return read
        self._errors.seek(0)
        self.failed = (self._errors.read().strip().splitlines() or ["it ended"])[-1]
        return None

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def close(self) -> None:
        """End the process: it ends by itself when there are no more turns."""
        self._process.communicate()
        self._errors.close()


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Child]:
    """Let the arms take turns, step by step."""
    children: dict[str, Child] = {}
    try:
        for arm in arguments.arms:
            children[arm] = Child(folder, arm)
        for child in children.values():
            child.wait()
        until = time.monotonic() + arguments.seconds
        for _ in range(arguments.steps):
            for child in children.values():
                if time.monotonic() > until:
                    return children
                if not child.failed:
                    child.step()
                    print(child.last(), file=sys.stderr, flush=True)
    finally:
        for child in children.values():
            child.close()
    return children


def row_of(
    arguments: argparse.Namespace, child: Child, children: dict[str, Child], tokens: list[int]
) -> dict[str, Any]:
    """Figures of one arm; ratios step by step, each of the same samples."""
    row: dict[str, Any] = {"arm": child.arm}
    if child.arm == TUNED:
        row["role"] = "tuned"
    first = arguments.warmup
    if child.failed or len(child.steps) <= first:
        return row | {"failed": child.failed or "no timed step"}
    seconds = [s["seconds"] for s in child.steps]
    timed = seconds[first:]
    row |= rows.quantiles(timed)
    row["tokens_per_s"] = statistics.median(
        t / s for t, s in zip(tokens[first:], timed, strict=False)
    )
    row["cpu_s"] = statistics.median(s["cpu_s"] for s in child.steps[first:])
    row["peak_bytes"] = int(child.steps[-1]["peak_bytes"])
    row["losses"] = [s["loss"] for s in child.steps]
    row["norms"] = [s["norm"] for s in child.steps]
    floor = children.get(child.arm.replace("ours", "products"))
    if floor is not None and floor is not child and not floor.failed:
        pairs = zip(floor.steps[first:], child.steps[first:], strict=False)
        row["share_of_floor"] = statistics.median(p["seconds"] / s["seconds"] for p, s in pairs)
    wide = children.get("ours, float32")
    if wide is not None and wide.steps:
        row["share_of_float32_memory"] = row["peak_bytes"] / wide.steps[-1]["peak_bytes"]
    truth, own = children.get("reference"), children.get("ours")
    if truth is not None and not truth.failed:
        for name, key in (("loss", "losses"), ("norm", "norms")):
            pairs = zip(row[key], (s[name] for s in truth.steps), strict=False)
            row[f"{name}_error"] = max(abs(a - b) / b for a, b in pairs)
    both = list(zip(child.steps, own.steps if own is not None else [], strict=False))[first:]
    if own is not None and both:
        ratios = [s["seconds"] / f["seconds"] for s, f in both]
        row["ours_times_less_cpu"] = statistics.median(s["cpu_s"] / f["cpu_s"] for s, f in both)
        row["ours_times_faster"] = statistics.median(ratios)
        row["ratio_p20"] = rows.quantiles(ratios)["p20_s"]
        row["ratio_p80"] = rows.quantiles(ratios)["p80_s"]
        row["ours_share_of_memory"] = own.steps[-1]["peak_bytes"] / row["peak_bytes"]
    return row


def show(table: list[dict[str, Any]]) -> None:
    """Print one line a row."""
    for row in table:
        if "p50_s" not in row:
            print(f"{row['arm']:32} {row['failed']}")
            continue
        print(
            f"{row['arm']:32} {row['p50_s']:8.2f} s {row['tokens_per_s']:8.0f} tokens/s "
            f"{row['peak_bytes'] / 2**20:7.0f} MiB  ours {row.get('ours_times_faster', 0):6.2f} x"
            f"  loss error {row.get('loss_error', 0):.1e}"
            f"  norm error {row.get('norm_error', 0):.1e}"
            f"  of the products' speed {row.get('share_of_floor', 0):.2f}"
        )


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this is for processors; gpu.py is for GPUs
    arguments = parse()
    sizes = TINY if arguments.smoke else Sizes()
    with tempfile.TemporaryDirectory() as folder:
        data = step_data.write(Path(folder), sizes, arguments.kind, arguments.steps)
        steps = step_data.read(Path(folder))
        if arguments.profile:
            script = str(Path(step_arms.__file__))
            table = rows.fresh_process([script, folder, "ours", "--profile"])["profile"]
            print("\n".join(f"{r['arm']:24} {r['p50_s']:.3f} s {r['share']:.1%}" for r in table))
        else:
            children = run(arguments, Path(folder))
            tokens = [sum(len(s.input_ids) for s in step) for step in steps]
            table = [row_of(arguments, child, children, tokens) for child in children.values()]
            show(table)
    part = next((p for p in PARTS if getattr(arguments, p)), "step")
    case = {"part": part, "kind": arguments.kind, "sizes": asdict(sizes), "seed": 0, **data}
    rows.append("step", [{**rows.facts(PACKAGES), **case, **r} for r in table], arguments.results)


if __name__ == "__main__":
    main()
