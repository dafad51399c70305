"""Whole training steps on one GPU for gpu.py: a 3B model in full, an 8B one with LoRA.

Models of random bfloat16 weights are written to a folder; the arms are those of step_arms.py, each
a process of its own that trains the same samples, 32 an optimizer step. Two such models do not fit
on a GPU together, so the arms run one after the other and their ratio is one of medians; ours runs
first, and once more at the end. Model FLOP utilisation:

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
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import rows
import step_arms
import step_data
from step import Child
from step_data import IGNORED, Sample, Sizes

PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # SXM, dense bf16
STEPS, WARMUP = 7, 2
LEAST_TIMED = 2  # steps of an arm whose time is up
ARM_SECONDS = 120  # a process that is not done by then is ended,
OVERRUN_SECONDS = 40  # ... or so long after the time of the section

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
    learning_rate=1e-5,
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


MODELS = {"3B full": LLAMA_3B, "8B LoRA": LLAMA_8B}
# Model, kind of samples, arm; what the goals ask for first.
DEFAULT, *OTHERS = step_arms.TRL_GPU
RUNS = (
    ("3B full", "mixed", "ours"),
    ("3B full", "uniform", "ours"),
    ("8B LoRA", "uniform", "ours"),
    ("3B full", "mixed", DEFAULT),
    *(("3B full", "mixed", arm) for arm in OTHERS),
    ("8B LoRA", "mixed", "ours"),
    ("8B LoRA", "mixed", DEFAULT),
    ("3B full", "mixed", "ours again"),
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
    """All runs; one that fails, or that no time is left for, says so and takes no other with it.

    Args:
        smoke: tiny models, ours alone.
    """
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as there:
        for model, kind, arm in RUNS:
            if smoke and (kind, arm) != ("mixed", "ours"):
                continue
            row: dict[str, Any] = {"model": model, "kind": kind, "arm": arm}
            table.append(row)
            if time.monotonic() > until:
                row["skipped"] = "the time of this section was spent"
                continue
            sizes, folder = tiny(MODELS[model]) if smoke else MODELS[model], Path(there) / model
            try:
                if folder.exists():
                    step_data.write_steps(folder, sizes, kind, STEPS)
                else:
                    step_data.write(folder, sizes, kind, STEPS)
                row |= measure(folder, sizes, arm, device, until)
            except Exception as error:
                said = (str(error).splitlines() or [""])[0]
                row["failed"] = f"{type(error).__name__}: {said}"
    compare(table)
    return table


def compare(table: list[dict[str, Any]]) -> None:
    """Add each arm's ratio to ours of the same model and samples; the peer's fastest is `best`."""
    for model, kind in dict.fromkeys((row["model"], row["kind"]) for row in table):
        rows_ = [r for r in table if (r["model"], r["kind"]) == (model, kind) and "p50_s" in r]
        own = next((row for row in rows_ if row["arm"].startswith("ours")), None)
        peers = [row for row in rows_ if row["arm"].startswith("TRL")]
        if peers:
            min(peers, key=lambda row: row["p50_s"])["role"] = "best"
        for row in rows_ if own is not None else []:
            assert own is not None
            row["ours_times_faster"] = row["p50_s"] / own["p50_s"]
            pairs = zip(row["losses"], own["losses"], strict=False)
            row["loss_apart"] = max(abs(a - b) / b for a, b in pairs)


def measure(folder: Path, sizes: Sizes, arm: str, device: str, until: float) -> dict[str, Any]:
    """Figures of one arm that has the machine to itself."""
    child = Child(folder, arm)
    left = min(ARM_SECONDS, until - time.monotonic() + OVERRUN_SECONDS)
    killer = threading.Timer(left, child.kill)
    killer.start()
    try:
        child.wait()
        steps = step_data.read(folder)
        while not child.failed and len(child.steps) < len(steps):
            if time.monotonic() > until and len(child.steps) >= WARMUP + LEAST_TIMED:
                break
            child.step()
    finally:
        killer.cancel()
        child.close()
    if child.failed:
        return {"failed": child.failed}
    timed = list(zip(child.steps, steps, strict=False))[WARMUP:]
    seconds = [own["seconds"] for own, _ in timed]
    tokens = [sum(len(s.input_ids) for s in samples) for _, samples in timed]
    flops = [model_flops(sizes, samples) for _, samples in timed]
    name = rows.machine()
    peak = next((v for n, v in PEAK_FLOPS.items() if device != "cpu" and n in name), None)
    return {
        **rows.quantiles(seconds),
        "tokens_per_step": statistics.mean(tokens),
        "tokens_per_s": sum(tokens) / sum(seconds),
        "model_tflops": statistics.mean(flops) / 1e12,
        "mfu": sum(flops) / sum(seconds) / peak if peak else None,
        "peak_bytes": int(child.steps[-1]["peak_bytes"]),
        "losses": [own["loss"] for own in child.steps],
        "norms": [own["norm"] for own in child.steps],
    }
