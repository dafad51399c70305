"""LoRA trials over one frozen base in one process, beside the same trials one after another.

    OMP_NUM_THREADS=1 python benchmarks/together.py
    python benchmarks/together.py --trials 1 2 --hidden 64 --steps 1     # quick

The base has the shape of a small Llama and random weights; rank, alpha and learning rate differ.
Each number of trials is a process of its own: once together, once one after another. What the
former saves against as many processes side by side is the base, for every trial but one. A row an
arm goes to benchmarks/results/together.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import rows

from posttrain_dist.config import AdamW, Dtype, Lora, RunConfig, complete
from posttrain_dist.metrics import WandbMode
from posttrain_dist.models import Weights

PACKAGES = ("posttrain-dist", "torch", "transformers", "peft")
RANKS = (8, 16, 4, 32)


def configs(base: Path, trials: int, steps: int) -> list[RunConfig]:
    """Runs that differ in rank, alpha and learning rate, in float32."""
    config = RunConfig(name="together", tuning=Lora())
    config.model.path, config.model.weights = str(base), Weights.random
    config.data.train, config.data.max_length = "embedded", 128
    config.train.steps, config.train.batch_size, config.train.micro_batch_size = steps, 2, 2
    config.train.dtype, config.eval.samples = Dtype.float32, 0
    config.logging.wandb, config.checkpoint.export = WandbMode.off, False
    return [
        complete(
            replace(
                config,
                tuning=Lora(rank=RANKS[i % len(RANKS)], alpha=2.0 * RANKS[i % len(RANKS)]),
                optimizer=AdamW(lr=1e-4 * (i + 1)),
            )
        )
        for i in range(trials)
    ]


def write_base(folder: Path, hidden: int) -> int:
    """A model folder without weights; bytes of its weights in float32."""
    from posttrain_dist.models.folder import read_network, resolve

    tiny = resolve("tiny_base")
    for file in tiny.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    network = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    heads = max(1, hidden // 64)
    network |= {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 8}
    network |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    network |= {"head_dim": hidden // heads}
    (folder / "config.json").write_text(json.dumps(network), encoding="utf-8")
    return 4 * read_network(str(folder)).num_parameters


def measure(base: Path, trials: int, steps: int, together: bool) -> dict[str, Any]:
    """Train them; peak memory over the libraries, and seconds without preparing."""
    from posttrain_dist.prepare import prepare
    from posttrain_dist.together.train_together import train_together
    from posttrain_dist.train import train

    with tempfile.TemporaryDirectory() as made:
        runs = [(c, Path(made) / str(i)) for i, c in enumerate(configs(base, trials, steps))]
        for config, folder in runs:
            prepare(config, folder / "prepared")
        began = time.perf_counter()
        with rows.Peak() as peak:
            if together:
                failed = [error for error in train_together(runs) if error is not None]
                if failed:
                    raise failed[0]
            else:
                for config, folder in runs:
                    train(config, folder)
        seconds = time.perf_counter() - began
    return {"peak_bytes": peak.over_start_bytes, "seconds": seconds}


def main() -> None:
    """Run every arm and print its line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    parser.add_argument("--arm", nargs=2, metavar=("FOLDER", "HOW"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        base, how = given.arm
        print(json.dumps(measure(Path(base), given.trials[0], given.steps, how == "together")))
        return
    with tempfile.TemporaryDirectory() as made:
        size = write_base(Path(made), given.hidden)
        for trials in given.trials:
            for how in ("together", "one by one"):
                words = [__file__, "--arm", made, how, "--trials", str(trials)]
                found = rows.fresh_process([*words, "--steps", str(given.steps)])
                row = rows.facts(PACKAGES) | {"trials": trials, "arm": how, "base_bytes": size}
                rows.append("together", [row | {"steps": given.steps} | found], given.results)
                print(
                    f"{trials} {how:<11} {found['peak_bytes'] / 2**20:7.0f} MiB "
                    f"{found['seconds']:6.1f} s (base {size / 2**20:.0f} MiB)",
                    file=sys.stderr,
                )


if __name__ == "__main__":
    main()
