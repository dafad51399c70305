"""What the small base model learns from the embedded preferences: DPO with an SFT term and without.

    OMP_NUM_THREADS=1 python benchmarks/preferences_learning.py
    OMP_NUM_THREADS=1 python benchmarks/preferences_learning.py --steps 2 --sft-steps 2    # quick

First the SFT of the demo in one process, then each arm on what it made. A row an arm goes to
benchmarks/results/preferences_learning.jsonl: held-out accuracy and log-probabilities before and
after, right answers to the held-out prompts before and after, alarms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import rows

from posttrain_dist.files import read_rows

POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"
PACKAGES = ("posttrain-dist", "torch", "transformers")
ARMS = {
    "SFT term 1.0": ["objective.sft_weight=1.0"],
    "SFT term 4.0": ["objective.sft_weight=4.0"],
    "plain": [],
}
SFT = ["data.max_length=256", "optimizer.lr=2e-3", "train.micro_batch_size=4", "name=sft"]
DPO = [
    *("objective=dpo", "model.path=run:sft", "data.max_length=256", "optimizer.lr=1e-4"),
    *("train.batch_size=3", "train.micro_batch_size=3", "eval.generate_rows=40"),
]
METRICS = ("accuracy", "raw_accuracy", "margin", "chosen_logprob", "rejected_logprob")


def train(folder: Path, *words: str) -> None:
    """`posttrain train words`, below `folder`."""
    command = [str(POSTTRAIN), "train", *words, "logging.wandb=off", f"output_root={folder}"]
    subprocess.run(command, check=True)


def measured(run: Path) -> dict[str, Any]:
    """The figures of a finished run."""
    evaluated = [row for row in read_rows(run / "metrics.jsonl") if "eval/loss" in row]
    first, last = evaluated[0], evaluated[-1]
    found: dict[str, Any] = {"steps": last["step"], "loss": last["eval/loss"]}
    for name in METRICS:
        key = f"eval_dpo/{name}"
        found |= {f"{name}_before": first[key], name: last[key]}
    prefix = "eval_dpo_channel_chosen_logprob/"
    channels = [key.removeprefix(prefix) for key in last if key.startswith(prefix)]
    found["chosen_logprob_of"] = {
        name: [first[prefix + name], last[prefix + name]] for name in channels
    }
    answers = json.loads((run / "answers.json").read_text(encoding="utf-8"))["exact_match"]
    found["right"] = {
        channel: [answers[when][channel]["right"] for when in ("before", "after")]
        for channel in answers["after"]
    }
    found["answered"] = sum(count["of"] for count in answers["after"].values())
    alarms = read_rows(run / "logs" / "alarms.jsonl")
    found["alarms"] = [[alarm["rule"], alarm["step"]] for alarm in alarms]
    return found


def main() -> None:
    """Train and measure every arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sft-steps", type=int, default=240)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        train(folder, *SFT, f"train.steps={options.sft_steps}")
        for arm, words in ARMS.items():
            name = f"arm{list(ARMS).index(arm)}"
            train(folder, *DPO, *words, f"train.steps={options.steps}", f"name={name}")
            (run,) = (folder / name).iterdir()
            row = {**rows.facts(PACKAGES), "arm": arm, **measured(run)}
            rows.append("preferences_learning", [row], options.results)
            print(json.dumps(row))


if __name__ == "__main__":
    main()
