"""Every way to tune side by side: the small base model on the embedded data, equal steps.

    OMP_NUM_THREADS=1 python benchmarks/tunings.py          # all arms, rates tuned, 3 seeds
    python benchmarks/tunings.py --arms lora prompt --steps 20 --seeds 0 --factors

Each arm is a run of the library in a process of its own, as `posttrain train tuning=...` makes it:
prepare, train, adapter folder, answers. First its learning rate is chosen among a few, by the
held-out loss of the first seed; then every seed is trained at that rate. One row an arm and seed
goes to benchmarks/results/tunings.jsonl, and one with their means. `run_info`, `train_info` and
`meta_info` of a row have the keys of the results of PEFT's method comparison suite, so that its
readers take them; memory is that of the host where there is no accelerator.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import rows

from posttrain_dist.config import (
    AdamW,
    Bottleneck,
    Dtype,
    Full,
    Ia3,
    Lora,
    Prefix,
    Prompt,
    PTuning,
    Quantize,
    RunConfig,
    complete,
)
from posttrain_dist.files import read_object, read_rows
from posttrain_dist.tuning.base import Tuning
from posttrain_dist.tuning.bottleneck import Placement
from posttrain_dist.tuning.lora import LoraInit

PACKAGES = ("posttrain-dist", "torch", "transformers", "peft", "bitsandbytes")
# PEFT's names for `meta_info.package_info`.
PEFT_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
INSTRUCTION = "Answer the task exactly as it is asked."
ARMS: dict[str, Tuning] = {
    "full": Full(),
    "lora": Lora(),
    "lora q,v": Lora(targets=["q_proj", "v_proj"]),
    "lora attention": Lora(targets="attention"),
    "lora mlp": Lora(targets="mlp"),
    "rslora": Lora(rslora=True),
    "pissa": Lora(init=LoraInit.pissa),
    "lora+": Lora(lr_ratio_b=8.0),
    "lora-fa": Lora(freeze_a=True),
    "dora": Lora(dora=True),
    "qlora": Lora(quantize=Quantize.nf4),
    "ia3": Ia3(),
    "prompt": Prompt(),
    "prompt from text": Prompt(init_text=INSTRUCTION),
    "prompt, ensemble of 3": Prompt(ensemble=3),
    "p_tuning": PTuning(),
    "prefix": Prefix(),
    "prefix from text": Prefix(init_text=INSTRUCTION),
    "bottleneck houlsby": Bottleneck(placement=Placement.houlsby),
    "bottleneck pfeiffer": Bottleneck(),
    "bottleneck parallel": Bottleneck(placement=Placement.parallel),
}
# Learning rates that are tried: those of the tuning times these.
FACTORS = (0.3, 1.0, 3.0, 10.0, 30.0)


def config_of(arm: str, lr: float | None, seed: int, steps: int, answers: int = 16) -> RunConfig:
    """One run: 4 packs of 256 tokens a step, in float32.

    Args:
        answers: of each channel with one right answer that are answered at the end.
    """
    config = RunConfig(name="tunings", seed=seed, tuning=ARMS[arm], optimizer=AdamW(lr=lr))
    config.data.train, config.data.max_length = "embedded", 256
    config.train.steps, config.train.batch_size, config.train.micro_batch_size = steps, 4, 4
    config.train.dtype = Dtype.float32
    config.eval.generate_rows, config.eval.samples = answers, 0
    return complete(config)


# ------------------------------------------------------------------- one arm, in its own process


def train_one(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Train, and what is known of it afterwards.

    Returns:
        the figures of a row, flat, and `train_info` of PEFT's schema.
    """
    import torch

    import posttrain_dist.train  # noqa: F401  what is imported is not the method's memory
    from posttrain_dist.run import run

    if not isinstance(config.tuning, Full):
        import peft  # noqa: F401
    started = time.perf_counter()
    with rows.Peak() as peak:
        run(config, folder, progress=False)
    total_s = time.perf_counter() - started
    logged = read_rows(folder / "metrics.jsonl")
    steps = logged[1:]
    counts = json.loads((folder / "logs" / "plan.json").read_text(encoding="utf-8"))
    saved = folder / ("export" if config.tuning.whole_model else "adapter")
    file_size = sum(path.stat().st_size for path in saved.rglob("*.safetensors"))
    answers = read_object(folder / "answers.json").get("exact_match", {"after": {}})
    cuda = torch.cuda.is_available()
    memory = torch.cuda.max_memory_reserved() if cuda else peak.over_start_bytes
    return {
        "heldout_before": logged[0]["eval/loss"],
        "heldout": logged[-1]["eval/loss"],
        "exact_match": _share(answers["after"]),
        "tokens_per_s": median(row["train/tokens_per_s"] for row in steps),
        "peak_bytes": memory,
        "saved_bytes": file_size,
        "trainable": counts["trained"],
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": steps[-1]["time_s"],
            "file_size": file_size,
            "num_trainable_params": counts["trained"],
            "num_total_params": counts["parameters"],
            "status": "success",
            "metrics": [_metric(row) for row in logged if "eval/loss" in row],
        },
        "total_time": total_s,
    }


def _metric(row: dict[str, Any]) -> dict[str, Any]:
    """A logged step under the names of PEFT's suite."""
    return {
        "step": row["step"],
        "valid loss": row["eval/loss"],
        "valid accuracy": row["eval/accuracy"],
        "train loss": row.get("train/loss"),
        "train time": row["time_s"],
        "tokens / sec": row.get("train/tokens_per_s"),
        "mem allocated max": row["system/memory_bytes"],
    }


def _share(counts: dict[str, Any]) -> float | None:
    """Of all answers that were asked for, those that were right."""
    pairs = [(each["right"], each["of"]) for each in counts.values()]
    asked = sum(total for _, total in pairs)
    return sum(right for right, _ in pairs) / asked if asked else None


# ------------------------------------------------------------------------------------ all arms


def measure(arm: str, lr: float | None, seed: int, steps: int, answers: int = 16) -> dict[str, Any]:
    """One run in a fresh process, as a row."""
    config = config_of(arm, lr, seed, steps)
    chosen = config.optimizer.lr  # type: ignore[attr-defined]
    given = [str(Path(__file__)), "--one", arm, "--lr", str(chosen), "--seeds", str(seed)]
    found = rows.fresh_process([*given, "--steps", str(steps), "--answers", str(answers)])
    values = config.to_dict()
    rate = {"lr": chosen, "seed": seed, "steps": steps}
    return {**rows.facts(PACKAGES), "arm": arm, **rate, **_with_schema(found, values, arm)}


def _with_schema(found: dict[str, Any], values: dict[str, Any], arm: str) -> dict[str, Any]:
    versions = rows.versions(PEFT_PACKAGES)
    package_info: dict[str, Any] = {}
    for name, value in versions.items():
        package_info |= {f"{name}-version": value, f"{name}-commit-hash": None}
    run_info = {
        "created_at": rows.facts(())["date"],
        "total_time": found.pop("total_time"),
        "experiment_name": f"{values['tuning']['kind']}/{arm.replace(' ', '-')}",
        "peft_branch": "main",
        "train_config": {group: values[group] for group in ("model", "optimizer", "train", "data")},
        "peft_config": values["tuning"],
        "error_msg": "",
    }
    meta_info = {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {"embedded": {"sha": None, "created_at": None}},
        "package_info": package_info,
        "system_info": {"system": platform.system(), "accelerator": rows.machine()},
        "pytorch_info": "",
    }
    return {**found, "run_info": run_info, "meta_info": meta_info}


def best_rate(arm: str, seed: int, steps: int, factors: Sequence[float]) -> float:
    """The learning rate of the lowest held-out loss."""
    default = ARMS[arm].default_lr
    losses: dict[float, float] = {}
    for factor in factors:
        lr = float(f"{default * factor:.2g}")
        try:
            losses[lr] = measure(arm, lr, seed, steps, answers=0)["heldout"]
        except RuntimeError as error:  # a rate that diverges ends the run
            print(f"{arm} at {lr:g}: {str(error).splitlines()[-1]}", file=sys.stderr)
            continue
        print(f"{arm:24} lr {lr:<8g} held-out {losses[lr]:.4f}", flush=True)
    return min(losses, key=lambda lr: losses[lr])


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--factors", nargs="*", type=float, default=FACTORS, help="of the default rate; none: it"
    )
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    parser.add_argument("--one", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--lr", type=float, help="the rate of all arms; none is tried")
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(given.one, given.lr, given.seeds[0], given.steps, given.answers)
            print(json.dumps(train_one(config, Path(folder) / "run")))
        return
    table: dict[str, list[dict[str, Any]]] = {}
    for arm in given.arms:
        lr = given.lr
        if lr is None and given.factors:
            lr = best_rate(arm, given.seeds[0], given.steps, given.factors)
        table[arm] = [measure(arm, lr, seed, given.steps) for seed in given.seeds]
        rows.append("tunings", [*table[arm], summary_of(table[arm])], given.results)
        print(_line(arm, table[arm]), flush=True)
    print("\n" + "\n".join(_line(arm, found) for arm, found in table.items()))


def summary_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over the seeds of an arm, and the lowest and highest held-out loss."""
    first = found[0]
    kept = ("date", "run", "command", "machine", "python", "versions", "load_1min", "arm", "lr")
    means = ("heldout", "heldout_before", "exact_match", "tokens_per_s", "peak_bytes")
    losses = [row["heldout"] for row in found]
    return {
        **{key: first[key] for key in (*kept, "steps", "trainable", "saved_bytes")},
        **{key: mean(row[key] for row in found) for key in means},
        "heldout_low": min(losses),
        "heldout_high": max(losses),
        "seeds": [row["seed"] for row in found],
        "summary": True,
    }


def _line(arm: str, found: list[dict[str, Any]]) -> str:
    first = found[0]
    return (
        f"{arm:24} lr {first['lr']:<8g} trained {first['trainable']:>9,} "
        f"saved {first['saved_bytes'] / 1e3:>8.0f} kB  held-out "
        f"{mean(row['heldout'] for row in found):.4f}  exact {first['exact_match']:.2f}"
    )


if __name__ == "__main__":
    main()
