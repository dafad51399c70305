"""QLoRA of a 70B model on one GPU: memory and speed at 4k, 8k and 16k packed tokens.

    python benchmarks/qlora_70b.py                     # at most 8 minutes on one H100
    python benchmarks/qlora_70b.py --shape small       # the same on a CPU, of a small model

The model has the shape of Llama 3 70B and random weights, made in NF4 on the device matrix by
matrix, so that 16 bits never stand there whole. What is trained is the library's own: LoRA of rank
16 on every linear layer but the head, in its Policy and its engine for one process, with full
activation checkpointing. Nothing is downloaded or installed; torch, transformers, peft, accelerate,
bitsandbytes and xxhash must be there, posttrain-dist need not be installed.

Four variants, each a process of its own: AdamW, and paged 8-bit AdamW, each with the inputs of
layers kept on the GPU and in host memory (model.checkpoint_offload). The first two try the longest
row that fits, too. Beside each peak stand the goal for one H100 and what the planner predicts of an
update (`posttrain plan`, posttrain_dist/planner/).

The table comes last; one row per line of it goes to benchmarks/results/qlora_70b.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for package, folder in (("posttrain_dist", ROOT), ("posttrain_kernels", ROOT / "kernels")):
    if find_spec(package) is None:
        sys.path.insert(0, str(folder))
        # ... and for the processes of the variants
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{before}" if before else str(folder)

import rows  # noqa: E402
import torch  # noqa: E402
from qlora_model import SHAPES, Shape, foretold_bytes, make_model, planned_job  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")
GIB = 2**30


# GiB on one H100 at each of the contexts, and tokens a second at the second of them.
GOALS = {False: (45, 51, 62), True: (46, 48, 52)}
GOAL_TOKENS_PER_S = 1000


@dataclass(frozen=True, slots=True)
class Variant:
    """One process of the benchmark."""

    name: str
    offload: bool  # inputs of layers wait in host memory
    state_bits: int
    paged: bool
    only: slice  # which of the contexts
    longest: bool  # whether the longest row that fits is searched
    share: float  # of the time


ALL, SECOND = slice(None), slice(1, 2)
VARIANTS = (
    Variant("AdamW", False, 32, False, ALL, True, 0.3),
    Variant("AdamW, offloaded", True, 32, False, ALL, True, 0.4),
    Variant("paged 8-bit AdamW", False, 8, True, SECOND, False, 0.15),
    Variant("paged 8-bit AdamW, offloaded", True, 8, True, SECOND, False, 0.15),
)


# ------------------------------------------------------------------------------ measuring


class Trained:
    """The model in the library's engine; steps on rows of any length."""

    def __init__(self, shape: Shape, variant: Variant) -> None:
        from posttrain_kernels import linear_cross_entropy, linear_logprob

        from posttrain_dist.engine import AdamW
        from posttrain_dist.engine.single import SingleEngine
        from posttrain_dist.models.head import HeadKernels
        from posttrain_dist.models.policy import Policy

        gpu = torch.cuda.is_available()
        self.shape, self.variant = shape, variant
        self.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        self.dtype = torch.bfloat16 if gpu else torch.float32
        model = make_model(shape, self.dtype, self.device, offload=variant.offload)
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        optimizer = AdamW(lr=1e-4, state_bits=variant.state_bits, paged=variant.paged)
        self.engine = SingleEngine(optimizer, self.device)
        kernels = HeadKernels(linear_cross_entropy, linear_logprob)
        self.engine.attach(Policy(model, kernels, num_channels=1))
        self.engine.train(True)

    def step(self, tokens: int, seed: int) -> float:
        """One optimizer step on a packed row; its loss."""
        from posttrain_dist.objectives.base import TokenCount, TokenLoss

        batch = row_of(self.shape, tokens, seed)
        count = TokenCount(batch.weight_sum)
        loss = self.engine.forward(batch.to(self.device), TokenLoss(), count)
        self.engine.backward(loss.total, last=True)
        self.engine.step(1e-4)
        return float(loss.total.detach())

    def measure(self, tokens: int, times: int = 2) -> dict[str, Any]:
        """Peak and speed of steps on `tokens`, the first of which is not timed."""
        seconds, losses = [], []
        with peak(self.device) as found:
            for seed in range(times):
                start = time.perf_counter()
                losses.append(self.step(tokens, seed))
                seconds.append(time.perf_counter() - start)
        timed = seconds[1:] or seconds
        return {
            "arm": self.variant.name,
            "tokens": tokens,
            "tokens_per_s": tokens * len(timed) / sum(timed),
            "step_s": sum(timed) / len(timed),
            **found,
            "foretold_bytes": foretold_bytes(
                planned_job(
                    self.shape,
                    tokens,
                    gpu=self.device.type == "cuda",
                    offload=self.variant.offload,
                    state_bits=self.variant.state_bits,
                )
            ),
            "losses": losses,
            "trained": self.trained,
        }


@contextmanager
def peak(device: torch.device) -> Iterator[dict[str, int]]:
    """Fills in `peak_bytes`: allocated on a GPU; resident beyond the start on a CPU."""
    found: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        return
    with rows.Peak() as host:
        yield found
    found["peak_bytes"] = host.start_bytes + host.over_start_bytes


def row_of(shape: Shape, tokens: int, seed: int) -> Any:
    """A packed row of samples, every second token supervised."""
    import numpy as np

    from posttrain_dist.data.packs.collate import collate
    from posttrain_dist.flow import Example

    draw = np.random.default_rng(seed)
    lengths = [min(shape.sample, tokens - at) for at in range(0, tokens, shape.sample)]
    examples = [
        Example(
            draw.integers(0, shape.vocabulary, n).astype(np.int32),
            (np.arange(n) % 2).astype(np.float32),
            channel=0,
            sample_id=i,
        )
        for i, n in enumerate(lengths)
    ]
    return collate(examples)


def longest(trained: Trained, measured: list[dict[str, Any]], until: float) -> dict[str, Any]:
    """The longest row that fits: by bisection between what ran and what did not.

    The first guess follows from the memory of the rows before; no trial begins that the time that
    is left would not hold.
    """
    step = trained.shape.step
    first, last = measured[0], measured[-1]
    fits, fails, row = int(last["tokens"]), 0, last
    guess = 2.0 * fits  # a host has no bound that is to be found
    if torch.cuda.is_available():
        slope = (last["peak_bytes"] - first["peak_bytes"]) / (last["tokens"] - first["tokens"])
        free_bytes = torch.cuda.mem_get_info()[1] - last["peak_bytes"]
        guess = fits + free_bytes / max(slope, 1.0)
    most = host_limit(trained) if trained.variant.offload else 2**30
    while not fails or fails - fits > step:
        tokens = min(round(guess if not fails else (fits + fails) / 2), most) // step * step
        if tokens <= fits:
            break
        if time.monotonic() + 1.3 * tokens / last["tokens_per_s"] > until:
            break
        try:
            row = trained.measure(tokens, times=1)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            fails = tokens
            for parameter in trained.engine.policy.parameters():
                parameter.grad = None
            continue
        fits, guess = tokens, 1.1 * tokens
        if not torch.cuda.is_available():
            break
    return row | {"longest": True, "fails_at": fails}


def host_limit(trained: Trained) -> int:
    """Tokens whose inputs of all layers take half of the host's free memory.

    Pinned blocks are rounded up to a power of two.
    """
    info = Path("/proc/meminfo").read_text(encoding="utf-8").split()
    free_bytes = int(info[info.index("MemAvailable:") + 1]) * 1024
    token = trained.shape.layers * trained.shape.hidden * trained.dtype.itemsize
    return free_bytes // 2 // (2 * token)


def out_of_memory(error: BaseException) -> bool:
    """Whether a library of the GPU, torch's own allocator included, found no memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(word in str(error).lower() for word in ("out of memory", "alloc_failed"))


def run_variant(shape: Shape, variant: Variant, seconds: float) -> list[dict[str, Any]]:
    """The rows of one variant, as far as the time goes."""
    until = time.monotonic() + seconds
    trained = Trained(shape, variant)
    found: list[dict[str, Any]] = []
    for tokens in shape.contexts[variant.only]:
        if found and time.monotonic() + 2.5 * tokens / found[-1]["tokens_per_s"] > until:
            break
        try:
            found.append(trained.measure(tokens))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return [*found, {"arm": variant.name, "tokens": tokens, "failed": "out of memory"}]
    if variant.longest:
        found.append(longest(trained, found, until))
    return found


# ------------------------------------------------------------------------------ the table


def with_goals(shape_name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with the goal of its context, where it has one."""
    shape = SHAPES[shape_name]
    row = {"section": "qlora", "shape": shape_name, **row}
    if shape_name != "70b" or row["tokens"] not in shape.contexts or row.get("longest"):
        return row
    place = shape.contexts.index(row["tokens"])
    row["goal_bytes"] = GOALS["offloaded" in row["arm"]][place] * GIB
    if place == 1:
        row["goal_tokens_per_s"] = GOAL_TOKENS_PER_S
    return row


def table(found: list[dict[str, Any]]) -> str:
    """One line for each row."""
    lines = [
        f"{'variant':30}{'tokens':>8}{'peak GiB':>10}{'goal':>6}{'foretold':>10}{'tokens/s':>10}"
        f"{'goal':>6}"
    ]
    for row in found:
        if "failed" in row:
            lines.append(f"{row['arm']:30}{row['tokens']:>8}  {row['failed']}")
            continue
        goal = f"{row['goal_bytes'] / GIB:.0f}" if "goal_bytes" in row else ""
        speed = f"{row['goal_tokens_per_s']}" if "goal_tokens_per_s" in row else ""
        note = "  the longest row tried that fits" if row.get("longest") else ""
        note += f"; {row['fails_at']} does not" if row.get("fails_at") else ""
        lines.append(
            f"{row['arm']:30}{row['tokens']:>8}{row['peak_bytes'] / GIB:>10.2f}{goal:>6}"
            f"{row['foretold_bytes'] / GIB:>10.2f}{row['tokens_per_s']:>10.0f}{speed:>6}{note}"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--seconds", type=float, default=450.0, help="of all variants together")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    parser.add_argument("--variant", choices=[v.name for v in VARIANTS], help="this one, as JSON")
    return parser.parse_args()


def main() -> None:
    """Run the variants one after the other, print the table last."""
    arguments = parse()
    if arguments.variant:
        variant = next(v for v in VARIANTS if v.name == arguments.variant)
        made = run_variant(SHAPES[arguments.shape], variant, arguments.seconds)
        print(json.dumps({"rows": made}))
        return
    end = time.monotonic() + arguments.seconds
    facts, found = rows.facts(PACKAGES), []
    for place, variant in enumerate(VARIANTS):
        # What the ones before left is for all that follow.
        share = variant.share / sum(v.share for v in VARIANTS[place:])
        seconds = str((end - time.monotonic()) * share)
        command = [__file__, "--shape", arguments.shape, "--variant", variant.name]
        try:
            made = rows.fresh_process([*command, "--seconds", seconds])["rows"]
        except RuntimeError as error:
            made = [{"arm": variant.name, "tokens": 0, "failed": str(error).splitlines()[-1]}]
        made = [with_goals(arguments.shape, row) for row in made]
        print(table(made), flush=True)
        found += made
    rows.append("qlora_70b", [facts | row for row in found], arguments.results)
    print(f"\nQLoRA of the shape {arguments.shape} on {facts['machine']}\n{table(found)}")
    sys.exit(any("failed" in row for row in found))


if __name__ == "__main__":
    main()
