"""`posttrain prepare` side by side with `datasets.map` and the same tokenizer, two processes each.

    pip install 'posttrain-dist[dev]' && python benchmarks/prepare.py [--rows 40000] [--rounds 3]

Both read the same JSONL of conversations with the tiny base model's tokenizer and template. Each
round times, in turn, a whole process of:
    ours  the command: read, render, tokenise, mask, every check, duplicates, the split, arrays and
          report
    map   datasets.load_dataset("json") and .map of apply_chat_template with
          return_assistant_tokens_mask, row by row as trainers do it, written as Arrow; no check
    batch the same with batched=True
Beside the time: of ours, when the first rows came; the most memory of all processes together, where
what they share counts once. Writes a row to benchmarks/results/prepare.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
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
from typing import Any, NamedTuple

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


class Run(NamedTuple):
    """What one whole process did."""

    seconds: float
    first_s: float  # from its start until rows came; 0 where that is not seen
    peak_bytes: int
    tokens: int


def ours(data: str, folder: Path) -> tuple[float, int]:
    """The command; returns when the first rows came, and the number of tokens."""
    from posttrain_launch.cli import main as command

    from posttrain_dist.data.prepared.summary import Summary
    from posttrain_dist.prepare import build_dataset

    store, came = build_dataset._store, list[float]()

    def watched(*arguments: Any) -> None:
        came.append(time.time())
        store(*arguments)

    build_dataset._store = watched
    settings = [
        *("model.path=tiny_base", "model.weights=random", f"data.train={data}", "name=run"),
        *(f"data.workers={PROCESSES}", f"data.cache={folder / 'cache'}", "data.max_length=256"),
        *("template.strict=false", f"output_root={folder}"),
    ]
    with contextlib.redirect_stdout(sys.stderr):
        assert command(["prepare", *settings]) == 0
    (prepared,) = (path.parent for path in (folder / "cache").glob("*/summary.json"))
    splits = Summary.read(prepared).splits.values()
    return came[0], sum(counts.tokens for split in splits for counts in split.values())


def mapped(data: str, folder: Path, batched: bool) -> tuple[float, int]:
    """datasets.map; returns 0 and the number of tokens."""
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

    return 0.0, int(pc.sum(pc.list_value_length(done.data.column("input_ids"))).as_py())


SIDES = {
    "ours": ours,
    "map": lambda data, folder: mapped(data, folder, batched=False),
    "batch": lambda data, folder: mapped(data, folder, batched=True),
}


def timed(side: str, data: Path) -> Run:
    """Run a side in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--side", side, "--data", str(data), "--to", str(folder)]
    try:
        start, began, peak = time.perf_counter(), time.time(), 0
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        ) as process:
            while process.poll() is None:
                peak = max(peak, memory_bytes(process.pid))
                time.sleep(0.1)
            seconds = time.perf_counter() - start
            assert process.stdout is not None and process.returncode == 0
            came, tokens = process.stdout.read().split()[-2:]
        first = max(float(came) - began, 0.0)
        return Run(seconds, first, peak, int(tokens))
    finally:
        shutil.rmtree(folder)


def memory_bytes(pid: int) -> int:
    """Memory of a process and of those that it started; shared pages are shared out."""
    total = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        total += 1024 * int(rollup.partition("\nPss:")[2].split()[0])
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children = (thread / "children").read_text(encoding="utf-8").split()
            total += sum(map(memory_bytes, map(int, children)))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        print(*SIDES[arguments.side](str(arguments.data), arguments.to))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, arguments.rows)
        rounds = [{side: timed(side, data) for side in SIDES} for _ in range(arguments.rounds)]
    facts = results.facts(("datasets", "transformers", "tokenizers"))
    found = [{**facts, **measured(side, rounds, arguments.rows)} for side in SIDES]
    results.append("prepare", found)
    print(json.dumps(found, indent=1))


def measured(side: str, rounds: list[dict[str, Run]], num_rows: int) -> dict[str, Any]:
    """The row of one side."""
    runs = [each[side] for each in rounds]
    seconds = [run.seconds for run in runs]
    row = {
        "arm": {"batch": "batched map"}.get(side, side),
        "rows": num_rows,
        "tokens": runs[0].tokens,
        **results.quantiles(seconds),
        "rows_per_s": num_rows / statistics.median(seconds),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "ours_times_faster": results.times_faster(seconds, [r["ours"].seconds for r in rounds]),
    }
    if side == "ours":
        row["first_s"] = statistics.median(run.first_s for run in runs)
    return row


if __name__ == "__main__":
    main()
