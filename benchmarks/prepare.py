"""`prepare` side by side with `datasets.map` and the same tokenizer, both with two processes.

    pip install 'posttrain-dist[dev]' && python benchmarks/prepare.py [--rows 40000] [--rounds 3]

Both read the same JSONL of conversations with the tiny base model's tokenizer and template. Each
round times, in turn, a whole process of:
    ours  posttrain_dist.prepare: read, render, tokenise, mask, every check, duplicates, the split,
          arrays and report
    map   datasets.load_dataset("json") and .map of apply_chat_template with
          return_assistant_tokens_mask, row by row as trainers do it, written as Arrow; no check
    batch the same with batched=True
Writes a row to benchmarks/results/prepare.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import rows as results

PROCESSES = 2


def write_rows(path: Path, num: int) -> None:
    """Conversations of one or two turns, lognormal in length, of words of the embedded data."""
    from posttrain_dist.data.embedded import split_path

    rows = map(json.loads, split_path("train").read_text(encoding="utf-8").splitlines())
    words = [word for row in rows for turn in row["messages"] for word in turn["content"].split()]
    draw = random.Random(0)

    def text(mean: float) -> str:
        return " ".join(draw.choices(words, k=1 + int(draw.lognormvariate(mean, 0.8))))

    with path.open("w", encoding="utf-8") as file:
        for i in range(num):
            messages = []
            for _ in range(1 + i % 2):
                messages.append({"role": "user", "content": text(3)})
                messages.append({"role": "assistant", "content": text(3.5)})
            file.write(json.dumps({"messages": messages, "task_type": f"c{i % 5}"}) + "\n")


def ours(data: str, folder: Path) -> int:
    """Prepare; returns the number of tokens."""
    from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, complete
    from posttrain_dist.prepare import prepare

    config = complete(
        RunConfig(
            model=ModelConfig(path="tiny_base"),
            data=DataConfig(train=data, workers=PROCESSES, cache=str(folder / "cache")),
        )
    )
    config.model.weights = type(config.model.weights).random  # positions are not looked at
    config.template.strict = False
    config.data.max_length = 256
    summary = prepare(config, folder / "prepared")
    return sum(c.tokens for split in summary.splits.values() for c in split.values())


def mapped(data: str, folder: Path, batched: bool) -> int:
    """datasets.map; returns the number of tokens."""
    import datasets
    from transformers import AutoTokenizer

    from posttrain_dist.models.folder import resolve

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny_base"))

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(
            row["messages"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            truncation=True,
            max_length=256,
        )
        return {"input_ids": made["input_ids"], "mask": made["assistant_masks"]}

    rows = datasets.load_dataset("json", data_files=data, split="train", cache_dir=str(folder))
    done = rows.map(encode, batched=batched, num_proc=PROCESSES, remove_columns=rows.column_names)
    import pyarrow.compute as pc

    return int(pc.sum(pc.list_value_length(done.data.column("input_ids"))).as_py())


SIDES = {
    "ours": ours,
    "map": lambda data, folder: mapped(data, folder, batched=False),
    "batch": lambda data, folder: mapped(data, folder, batched=True),
}


def timed(side: str, data: Path) -> tuple[float, int]:
    """Wall time of a whole process, and its tokens."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--side", side, "--data", str(data), "--to", str(folder)]
    try:
        start = time.perf_counter()
        done = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True, encoding="utf-8"
        )
        return time.perf_counter() - start, int(done.stdout.split()[-1])
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        print(SIDES[arguments.side](str(arguments.data), arguments.to))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, arguments.rows)
        rounds = [{side: timed(side, data) for side in SIDES} for _ in range(arguments.rounds)]
    seconds = {side: statistics.median(r[side][0] for r in rounds) for side in SIDES}
    tokens = {side: rounds[0][side][1] for side in SIDES}
    row = {
        **results.facts(("datasets", "transformers", "tokenizers")),
        "rows": arguments.rows,
        "tokens": tokens,
        "seconds": {side: round(value, 2) for side, value in seconds.items()},
        "rows_per_s": {side: round(arguments.rows / value) for side, value in seconds.items()},
        "tokens_per_s": {side: round(tokens[side] / value) for side, value in seconds.items()},
        "times_faster": {
            side: round(statistics.median(r[side][0] / r["ours"][0] for r in rounds), 2)
            for side in SIDES
            if side != "ours"
        },
    }
    results.append("prepare", [row])
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
