"""What DeepSpeed costs over a plain step of the same model, before and after our settings.

    python benchmarks/deepspeed_overhead.py

Arms, every process with one thread, float32, random Llama models, driven as the loop drives them:
    single       the `single` engine; with two processes, two of them side by side that never talk
    stock        DeepSpeed with its own defaults
    ours         the settings of posttrain_dist/engine/ds_tuning.py
    sharded      (stage 3) ours with persistence_threshold=0: no parameter stays whole
    floor        (two processes) nothing but the collectives: an all-reduce of all gradients, a
                 million elements at a time, and an all-gather of all weights, over gloo

Each arm has its own processes, so that none changes another; they take turns, A B C A B C, and wait
while it is not theirs. `ratio` is the median over the rounds of an arm's time over that of `single`
in the same round, `cpu_ratio` the same of processor time. Writes rows to
benchmarks/results/deepspeed_overhead.jsonl. `--worlds 2 --sizes 50m --stages 3` measures a part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from rows import append, facts, quantiles, resident_bytes, take_turns

SIZES = {
    "10m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab": 8192},
    "50m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "vocab": 16384},
}
FLOOR_BUCKET = 1_000_000  # elements
WARMUP = 3  # rounds; DeepSpeed records its trace of modules in the first two steps

# ---------------------------------------------------------------------------------- worker


def make_model(folder: Path, size: str) -> Path:
    """A random Llama of about that many parameters."""
    import torch
    import transformers

    shape = dict(SIZES[size])
    vocab = shape.pop("vocab")
    heads = shape["hidden_size"] // 64
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **shape, vocab_size=vocab, num_attention_heads=heads, num_key_value_heads=heads
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / size)
    return folder / size


def make_batches(rank: int, vocab: int, tokens: int) -> list[Any]:
    """Four packs of four samples, half of the tokens supervised."""
    import numpy as np

    from posttrain_dist.data.packs.collate import collate
    from posttrain_dist.flow import Example

    draw, length = np.random.default_rng(rank), tokens // 4

    def example(sample_id: int) -> Example:
        return Example(
            input_ids_L=draw.integers(0, vocab, length).astype(np.int32),
            weight_L=(draw.random(length) < 0.5).astype(np.float32),
            channel=0,
            sample_id=sample_id,
        )

    return [collate([example(i) for i in range(4)]) for _ in range(4)]


def make_engine(arm: str, stage: int) -> Any:
    """The engine of an arm; `stock` takes our settings away again."""
    import torch

    from posttrain_dist.engine import AdamW, DeepSpeed
    from posttrain_dist.engine import deepspeed as ours
    from posttrain_dist.engine.single import SingleEngine

    cpu, optimizer = torch.device("cpu"), AdamW(lr=1e-4)
    if arm == "single":
        return SingleEngine(optimizer, cpu)
    if arm == "stock":
        for name in ("tuned_zero", "loading_zero"):
            setattr(ours, name, lambda *_, **__: {})
        for name in ("set_local_size", "keep_freed_memory"):
            setattr(ours, name, lambda: None)
    config = DeepSpeed(stage=stage)
    if arm == "sharded":
        config.persistence_threshold = 0
    return ours.DeepSpeedEngine(config, optimizer, cpu, torch.float32)


def training(options: argparse.Namespace) -> Callable[[], list[float]]:
    """A function that takes one step: its loss, processor seconds of forward, backward, step."""
    import torch
    from posttrain_kernels import linear_cross_entropy, linear_logprob

    from posttrain_dist.models import ModelConfig
    from posttrain_dist.models.head import HeadKernels
    from posttrain_dist.models.load import load_model
    from posttrain_dist.models.policy import Policy
    from posttrain_dist.objectives.base import TokenCount, TokenLoss

    engine = make_engine(options.arm, options.stage)
    folder = Path(options.folder)
    model = load_model(
        ModelConfig(path=str(folder)),
        folder,
        dtype=torch.float32,
        seed=0,
        materialise=engine.materialise(),
    )
    policy = Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 1)
    engine.attach(policy)
    engine.train(True)
    batches = make_batches(options.rank, policy.config.vocab_size, options.tokens)
    objective, steps = TokenLoss(), iter(range(1 << 30))
    tokens = sum(objective.count(batch).tokens for batch in batches)
    denominators = TokenCount(tokens / len(batches) * engine.world)

    def step() -> list[float]:
        batch = batches[next(steps) % len(batches)]
        at = [time.process_time()]
        loss = engine.forward(batch, objective, denominators)
        at.append(time.process_time())
        engine.backward(loss.total, last=True)
        at.append(time.process_time())
        engine.step(1e-4)
        at.append(time.process_time())
        return [float(loss.total), *(b - a for a, b in pairwise(at))]

    return step


def collectives(numel: int, world: int) -> Callable[[], list[float]]:
    """A function that moves what one step moves, and computes nothing."""
    import torch
    from torch import distributed

    gradients, whole = torch.ones(numel), torch.empty(numel // world * world)
    shard = torch.ones(numel // world)

    def step() -> list[float]:
        for bucket in gradients.split(FLOOR_BUCKET):
            distributed.all_reduce(bucket)
        distributed.all_gather_into_tensor(whole, shard)
        gradients.fill_(1.0)
        return [0.0] * 4

    return step


def work(options: argparse.Namespace) -> None:
    """Be one process of an arm: read how many steps to take, take them, tell what they cost."""
    import torch

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # DeepSpeed prints
    torch.set_num_threads(1)
    if not options.arm.startswith("single"):
        from posttrain_dist import dist

        rank, world = options.rank, options.world
        process = dist.Process(
            rank=rank, world=world, local_rank=rank, master_port=options.master_port
        )
        dist.start(process)
    floor = options.arm == "floor"
    step = collectives(options.numel, options.world) if floor else training(options)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        start = time.process_time()
        steps = [step() for _ in range(int(line))]
        report = {
            "cpu_s": (time.process_time() - start) / len(steps),
            "phases_cpu_s": steps[-1][1:],
            "loss": steps[-1][0],
            "peak_bytes": resident_bytes("VmHWM"),
        }
        print(json.dumps(report), file=answers, flush=True)


# ------------------------------------------------------------------------------- conductor


class Arm:
    """The processes of one arm; called, they take `steps` steps together."""

    def __init__(self, processes: list[subprocess.Popen[str]], steps: int) -> None:
        self.processes, self.steps = processes, steps
        self.reports: list[list[dict[str, Any]]] = []

    def __call__(self) -> None:
        for process in self.processes:
            print(self.steps, file=process.stdin, flush=True)
        self.reports.append([json.loads(process.stdout.readline()) for process in self.processes])

    def cpu_s(self) -> list[float]:
        """Processor seconds of a step, mean of the processes, each round after warm-up."""
        return [statistics.mean(p["cpu_s"] for p in round_) for round_ in self.reports[WARMUP:]]

    def phases_cpu_s(self) -> dict[str, float]:
        """Median processor seconds of rank 0 in forward, backward and the optimizer's step."""
        rounds = [round_[0]["phases_cpu_s"] for round_ in self.reports[WARMUP:]]
        medians = map(statistics.median, zip(*rounds, strict=True))
        return dict(zip(("forward", "backward", "step"), medians, strict=True))


@contextmanager
def arm_of(name: str, stage: int, world: int, steps: int, given: dict[str, Any]) -> Iterator[Arm]:
    """Start an arm's processes one arm at a time; ends them by closing their input."""
    from posttrain_dist.dist import _free_port

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    shared = {"arm": name, "stage": stage, "world": world, "master-port": _free_port(), **given}
    processes = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        for rank in range(world):
            words = [f"--{key}={value}" for key, value in {**shared, "rank": rank}.items()]
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, *words],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    encoding="utf-8",
                )
            )
        try:
            if any(process.stdout.readline() != "ready\n" for process in processes):
                errors.seek(0)
                raise RuntimeError(f"{name} did not start:\n{errors.read()[-3000:]}")
            yield Arm(processes, steps)
        finally:
            for process in processes:
                process.stdin.close()
            for process in processes:
                process.wait()


def compare(size: str, world: int, stage: int, options: argparse.Namespace, folder: Path) -> None:
    """One row an arm: all arms of a stage in turn."""
    from safetensors import safe_open

    with safe_open(folder / size / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in list(file.keys())]
    numel = sum(map(math.prod, shapes))
    names = ["single", "stock", "ours"]
    names += ["sharded"] if stage == 3 else []
    names += ["floor"] if world > 1 else []
    given = {"folder": folder / size, "tokens": options.tokens, "numel": numel}
    with ExitStack() as stack:
        arms = {
            name: stack.enter_context(arm_of(name, stage, world, options.steps, given))
            for name in names
        }
        taken = take_turns(arms, rounds=options.rounds, warmup=WARMUP)
    losses = {name: sum(p["loss"] for p in arms[name].reports[-1]) for name in names}
    if abs(losses["ours"] / losses["stock"] - 1) > 1e-5:
        raise RuntimeError(f"ours trains another model than stock: {losses}")
    made = []
    for name, arm in arms.items():
        seconds = [s / options.steps for s in taken[name]]
        pairs = list(zip(taken[name], taken["single"], strict=True))
        cpu = [a / b for a, b in zip(arm.cpu_s(), arms["single"].cpu_s(), strict=True)]
        made.append(
            {
                **facts(["torch", "deepspeed", "transformers"]),
                "arm": name,
                "size": size,
                "parameters": numel,
                "processes": world,
                "stage": stage,
                "tokens": options.tokens,
                **quantiles(seconds),
                "ratio": statistics.median(a / b for a, b in pairs),
                "ratio_p20_p80": [round(sorted(a / b for a, b in pairs)[i], 3) for i in (1, -2)],
                "cpu_ratio": statistics.median(cpu),
                "cpu_s": statistics.median(arm.cpu_s()),
                "phases_cpu_s": arm.phases_cpu_s(),
                "peak_bytes": max(p["peak_bytes"] for p in arm.reports[-1]),
                "loss": losses[name],
            }
        )
        row = made[-1]
        print(
            f"{size} x{world} zero{stage} {name:12} {row['p50_s'] * 1e3:8.1f} ms"
            f"  ratio {row['ratio']:.3f} {row['ratio_p20_p80']}  cpu {row['cpu_ratio']:.3f}"
            f" {[round(s * 1e3) for s in row['phases_cpu_s'].values()]}"
            f"  peak {row['peak_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )
    append("deepspeed_overhead", made)


def main() -> None:
    """Measure, print, append rows; or be a worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--tokens", type=int, default=512, help="of a step and process")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    for name in ("arm", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("rank", "world", "stage", "numel", "master-port"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        work(options)
        return
    with tempfile.TemporaryDirectory() as name:
        for size in options.sizes:
            make_model(Path(name), size)
            for world in options.worlds:
                for stage in options.stages:
                    compare(size, world, stage, options, Path(name))


if __name__ == "__main__":
    main()
