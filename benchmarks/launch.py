"""From a command to its first training step, and what Ray takes of it, each in fresh processes.

    pip install 'posttrain-dist[dev]' && python benchmarks/launch.py [--rounds 3] [--arms bare,ray]

Every training reads the same JSONL of conversations and trains the packaged small base model, two
packs of 256 tokens a step, in float32. "First step" is the moment at which the line of step 1 is
in metrics.jsonl (of the bare loop: in a file that it writes right after its first step); the clock
starts before the process does, and the file is looked at every 5 ms. There are no held-out rows,
so nothing comes before step 1. The arms, in turn:

    bare        one script: import torch and transformers, load tokenizer and model, tokenise all
                rows by the chat template, one step of torch's fused AdamW with the same fused head
    local       posttrain train cluster=local engine=single, data prepared for the first time
    local_again the same with the data in the cache
    ray         posttrain train cluster=ray cluster.address=HOST:PORT on a Ray that runs; the data
                is in the cache, as for local_again
    ray_cold    the same without a running Ray: the run starts one of its own
    empty_stock a Ray Train job that does nothing, on the running Ray, everything by its default:
                TorchTrainer(fn).fit(), from the start of the process to its end
    empty_ours  the same job through posttrain_launch.ray.trainer, as a run goes

Writes one row an arm to benchmarks/results/launch.jsonl. `over_s` is the median over the rounds of
the arm less its reference (local to bare, ray to local_again, empty_ours to empty_stock).
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rows

ROWS, PACKS, PACK_TOKENS = 1000, 2, 256
BIN = Path(sysconfig.get_path("scripts"))
REFERENCE = {
    "local": "bare",
    "local_again": "bare",
    "ray": "local_again",
    "ray_cold": "local_again",
    "empty_ours": "empty_stock",
}
TRAIN = [
    "engine=single",
    "train.steps=1",
    f"train.batch_size={PACKS}",
    "train.dtype=float32",
    f"data.max_length={PACK_TOKENS}",
    "data.eval_fraction=0",
    "logging.wandb=off",
    "checkpoint.export=false",
]


# ------------------------------------------------------------------------ what an arm runs


def bare(data: str, done: str) -> None:
    """The loop that somebody writes who wants one model trained on one file."""
    import torch
    from posttrain_kernels import linear_cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain_dist.models.folder import resolve

    folder = resolve("tiny_base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    encoded = [
        tokenizer.apply_chat_template(
            json.loads(line)["messages"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        for line in Path(data).read_text(encoding="utf-8").splitlines()
    ]
    ids = [i for each in encoded for i in each["input_ids"]][: PACKS * PACK_TOKENS]
    mask = [m for each in encoded for m in each["assistant_masks"]][: PACKS * PACK_TOKENS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    count = sum(mask)
    for start in range(0, PACKS * PACK_TOKENS, PACK_TOKENS):
        ids_T = torch.tensor(ids[start : start + PACK_TOKENS])
        mask_T = torch.tensor(mask[start : start + PACK_TOKENS])
        supervised_N = mask_T[1:].nonzero().squeeze(1)
        hidden_TD = model.model(ids_T[None]).last_hidden_state[0]
        loss = linear_cross_entropy(
            hidden_TD,
            model.lm_head.weight,
            ids_T[supervised_N + 1],
            supervised=supervised_N,
            denominator=count,
        ).loss
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    Path(done).write_text('{"step": 1}\n', encoding="utf-8")


def empty_stock(address: str, folder: str) -> None:
    """A Ray Train job by its defaults."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    os.chdir(folder)
    ray.init(address=address)
    TorchTrainer(
        lambda: None,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=folder),
    ).fit()
    ray.shutdown()


def empty_ours(address: str, folder: str) -> None:
    """A Ray Train job as a run starts it, with nothing in its worker."""
    from posttrain_launch.ray.child import quiet_environment

    os.environ |= quiet_environment()
    os.chdir(folder)
    import ray

    ray.init(address=address, log_to_driver=False)
    from posttrain_launch.ray import trainer as ray_train

    from posttrain_dist.config import Ray, RunConfig, complete

    ray_train.train_worker = lambda settings: None
    config = complete(RunConfig(cluster=Ray(address=address)))
    ray_train.fit(config, Path(folder), 1, use_gpu=False, spread=False, here=False)
    ray.shutdown()


# ------------------------------------------------------------------------------- the clock


def first_step(command: list[str], root: Path, environment: dict[str, str]) -> float:
    """Seconds from the start of `command` to a line of step 1 in `root/**/metrics.jsonl`.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    with (root / "said.txt").open("w", encoding="utf-8") as said:
        child = subprocess.Popen(command, env=environment, cwd=root, stdout=said, stderr=said)
    found = None
    while found is None and child.poll() is None:
        time.sleep(0.005)
        for file in root.glob("run/*/metrics.jsonl"):
            if '"step": 1' in file.read_text(encoding="utf-8"):
                found = time.perf_counter() - start
    if child.wait() or found is None:
        said = (root / "said.txt").read_text(encoding="utf-8")
        raise RuntimeError(f"{' '.join(command)} failed:\n{said[-2000:]}")
    return found


def arms(data: Path, address: str, environment: dict[str, str]) -> dict[str, Any]:
    """Name -> function that runs it once and returns its seconds."""
    me = [sys.executable, str(Path(__file__).resolve()), "--child"]

    def training(*words: str, cache: Path | None = None) -> float:
        with _folder() as root:
            kept = cache or root / "cache"
            train = [str(BIN / "posttrain"), "train", *TRAIN, *words, f"data.train={data}"]
            command = [*train, f"data.cache={kept}", f"output_root={root}"]
            return first_step(command, root, environment)

    def script() -> float:
        with _folder() as root:
            (root / "run" / "bare").mkdir(parents=True)
            marker = root / "run" / "bare" / "metrics.jsonl"
            return first_step([*me, "bare", str(data), str(marker)], root, environment)

    def job(name: str) -> float:
        with _folder() as root:
            start = time.perf_counter()
            subprocess.run(
                [*me, name, address, str(root)], env=environment, check=True, capture_output=True
            )
            return time.perf_counter() - start

    cache = data.parent / "cache"
    return {
        "bare": script,
        "local": lambda: training("cluster=local"),
        "local_again": lambda: training("cluster=local", cache=cache),
        "ray": lambda: training("cluster=ray", f"cluster.address={address}", cache=cache),
        "ray_cold": lambda: training("cluster=ray", cache=cache),
        "empty_stock": lambda: job("empty_stock"),
        "empty_ours": lambda: job("empty_ours"),
    }


# ------------------------------------------------------------------------------ surroundings


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="launch-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running_ray(environment: dict[str, str]) -> Iterator[str]:
    """The address of a Ray on this machine, with as many CPUs as it has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray-")
    head = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}"]
    head += ["--include-dashboard=false", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    child = subprocess.Popen(
        [*head, "--object-store-memory=200000000", "--disable-usage-stats"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(10)  # for its first workers too
        yield f"127.0.0.1:{port}"
    finally:
        child.terminate()
        child.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _write_rows(path: Path) -> None:
    from posttrain_dist.data.embedded import split_path

    lines = split_path("train").read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line}\n" for line in lines[:ROWS]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--arms", default="bare,local,local_again,ray,ray_cold,empty_stock,empty_ours"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, *given = arguments.child
        {"bare": bare, "empty_stock": empty_stock, "empty_ours": empty_ours}[name](*given)
        return
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    environment.pop("RAY_ADDRESS", None)
    with _folder() as folder, _running_ray(environment) as address:
        data = folder / "rows.jsonl"
        _write_rows(data)
        every = arms(data, address, environment)
        chosen = {name: every[name] for name in arguments.arms.split(",")}
        taken: dict[str, list[float]] = {name: [] for name in chosen}
        for turn in range(arguments.rounds + 1):  # the first reads everything from the disk
            for name, run in chosen.items():
                seconds = run()
                time.sleep(2)  # for the last of its processes to end
                print(f"round {turn}  {name:<12} {seconds:6.2f} s", flush=True)
                if turn:
                    taken[name].append(seconds)
    facts = rows.facts(["ray", "torch", "transformers", "hydra-core"])
    written = []
    for name, seconds in taken.items():
        row = {**facts, "arm": name, **rows.quantiles(seconds)}
        if (reference := REFERENCE.get(name)) in taken:
            pairs = zip(seconds, taken[reference], strict=True)
            row |= {"over": reference, "over_s": statistics.median(a - b for a, b in pairs)}
        written.append(row)
        print(json.dumps(row))
    rows.append("launch", written)


if __name__ == "__main__":
    main()
