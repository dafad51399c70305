"""Whole training steps on one GPU for gpu.py: a 3B model in full, an 8B one with LoRA.

Models of random bfloat16 weights are written to a folder; the arms are those of step_arms.py, each
a process of its own that trains the same samples, 32 an optimizer step. Two such models do not fit
on a GPU together, so the arms run one after the other and their ratio is one of medians; ours runs
first and, in the first case, last again. Model FLOP utilisation:

    MFU = model FLOP of the step / (seconds · peak)
    model FLOP = k · P · T  +  6 · P_lora · T  +  k · D · V · N_s  +  6 · L · A · sum(len^2)

with k = 6, or 4 where the weights are frozen (no gradient of theirs); P parameters of the layers,
without embedding and head; T tokens; N_s supervised ones; A = heads · head size; the last term is
causal attention (2 · L · A · len^2 forward, twice that backward). What is computed again in
backward does not count. Peak is the GPU's dense bf16 rate by its data sheet.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rows
import step_arms
import step_data
from step import Child
from step_data import IGNORED, Sample, Sizes

PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # SXM, dense bf16
STEPS, WARMUP = 7, 2
DEFAULT, *TUNED = step_arms.TRL_GPU

LLAMA_3B = Sizes(
    hidden=3072,
    layers=28,
    feed_forward=8192,
    heads=24,
    kv_heads=8,
    vocabulary=128_256,
    tied=True,
    dtype="bfloat16",
    checkpoint_layers=14,  # with them 80 GB hold weights, masters, moments and a pack
    pack_tokens=8192,
    samples=32,
    mean_log_length=6.0,
    uniform_length=512,
)
LLAMA_8B = replace(
    LLAMA_3B,
    hidden=4096,
    layers=32,
    feed_forward=14_336,
    heads=32,
    tied=False,
    lora_rank=16,
    checkpoint_layers=0,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One model, one kind of samples, and the arms that train it."""

    model: str
    sizes: Sizes
    kind: str
    arms: tuple[str, ...]


CASES = (
    Case("3B full", LLAMA_3B, "mixed", ("ours", *step_arms.TRL_GPU, "ours again")),
    Case("3B full", LLAMA_3B, "uniform", ("ours",)),
    Case("8B LoRA", LLAMA_8B, "mixed", ("ours", DEFAULT)),
    Case("8B LoRA", LLAMA_8B, "uniform", ("ours",)),
)


def tiny(sizes: Sizes) -> Sizes:
    """The same kind of model and step, so small that a CPU trains it in a moment."""
    return replace(
        sizes,
        hidden=32,
        layers=2,
        feed_forward=64,
        heads=4,
        kv_heads=2,
        vocabulary=2048,
        dtype="float32",
        lora_rank=sizes.lora_rank and 2,
        checkpoint_layers=sizes.checkpoint_layers and 1,
        pack_tokens=1024,
        mean_log_length=3.0,
        uniform_length=16,
    )


def layer_parameters(sizes: Sizes) -> tuple[int, int]:
    """Parameters of all layers, and of LoRA on all their projections."""
    hidden, feed_forward = sizes.hidden, sizes.feed_forward
    shared = hidden // sizes.heads * sizes.kv_heads
    matrices = [
        *[(hidden, hidden)] * 2,
        *[(hidden, shared)] * 2,
        *[(hidden, feed_forward)] * 3,
    ]
    dense = sum(a * b for a, b in matrices) + 2 * hidden  # its two norms
    lora = sizes.lora_rank * sum(a + b for a, b in matrices)
    return sizes.layers * dense, sizes.layers * lora


def model_flops(sizes: Sizes, samples: list[Sample]) -> float:
    """The formula of this file's head, of one step."""
    lengths = [len(s.input_ids) for s in samples]
    supervised = sum(x != IGNORED for s in samples for x in s.labels[1:])
    k, tokens = (4 if sizes.lora_rank else 6), sum(lengths)
    dense, lora = layer_parameters(sizes)
    head = k * sizes.hidden * sizes.vocabulary * supervised
    attention = 6.0 * sizes.layers * sizes.hidden * sum(n * n for n in lengths)
    return (k * dense + 6 * lora) * tokens + head + attention


def all_steps(device: str, smoke: bool, until: float) -> list[dict[str, Any]]:
    """All cases; an arm that no time is left for says so. `smoke`: tiny models, ours alone."""
    table: list[dict[str, Any]] = []
    cases = [replace(c, arms=("ours",)) for c in CASES if c.kind == "mixed"] if smoke else CASES
    with tempfile.TemporaryDirectory() as there:
        last = None
        for case in cases:
            sizes, folder = tiny(case.sizes) if smoke else case.sizes, Path(there) / case.model
            if case.model == last:
                step_data.write_steps(folder, sizes, case.kind, STEPS)
            elif time.monotonic() < until:
                step_data.write(folder, sizes, case.kind, STEPS)
                last = case.model
            own: dict[str, Any] = {}
            for arm in case.arms:
                row = {"model": case.model, "kind": case.kind, "arm": arm}
                if time.monotonic() > until:
                    table.append(row | {"skipped": "the time of this section was spent"})
                    continue
                row |= measure(folder, sizes, arm, device)
                own = own or row
                if "p50_s" in row and "p50_s" in own:
                    row["ours_times_faster"] = row["p50_s"] / own["p50_s"]
                    row["loss_apart"] = max(
                        abs(a - b) / b for a, b in zip(row["losses"], own["losses"], strict=True)
                    )
                table.append(row)
            mark_tuned(table[-len(case.arms) :])
    return table


def mark_tuned(table: list[dict[str, Any]]) -> None:
    """Say of the peer's arms which is the fastest that is not as it comes."""
    tried = [r for r in table if "p50_s" in r and r["arm"] in TUNED]
    if tried:
        min(tried, key=lambda row: row["p50_s"])["role"] = "tuned"


def measure(folder: Path, sizes: Sizes, arm: str, device: str) -> dict[str, Any]:
    """Figures of one arm that has the machine to itself."""
    steps = step_data.read(folder)
    child = Child(folder, arm)
    child.wait()
    for _ in steps:
        if not child.failed:
            child.step()
    child.close()
    if child.failed:
        return {"failed": child.failed}
    timed = list(zip(child.steps, steps, strict=True))[WARMUP:]
    found: dict[str, Any] = rows.spread([own["seconds"] for own, _ in timed])
    tokens = [sum(len(s.input_ids) for s in samples) for _, samples in timed]
    found["tokens_per_step"] = statistics.mean(tokens)
    found["tokens_per_s"] = sum(tokens) / sum(own["seconds"] for own, _ in timed)
    flops = [model_flops(sizes, samples) for _, samples in timed]
    found["model_tflops"] = statistics.mean(flops) / 1e12
    name = rows.machine()
    peak = next((v for n, v in PEAK_FLOPS.items() if device != "cpu" and n in name), None)
    found["mfu"] = sum(flops) / sum(own["seconds"] for own, _ in timed) / peak if peak else None
    found["peak_bytes"] = int(child.steps[-1]["peak_bytes"])
    found["losses"] = [own["loss"] for own in child.steps]
    found["norms"] = [own["norm"] for own in child.steps]
    return found
