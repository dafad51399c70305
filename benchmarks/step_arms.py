"""One arm of step.py in a process of its own: it trains one optimizer step a line of stdin.

    python benchmarks/step_arms.py <folder> <arm>

So the parent lets the arms take turns, step by step, and each arm's memory is its own. A line is
written after each step: its seconds, from the line that asked for it until the loss and the
gradient norm are logged (so data and logging count), loss, norm, and the memory peak since the
model was there. That is counted over what the process held before: each arm first trains a tiny
model, so that its libraries and their threads are there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import rows
import step_data
import step_floor
import torch
from step_data import IGNORED, Sample, Sizes

from posttrain_dist.flow import Loss
from posttrain_dist.objectives.sft import Sft

BETAS, CLIP = (0.9, 0.95), 1.0
FLOOR_DTYPES = ("float32", "bfloat16")


class NoSync:
    """Waits for no other arm: for training before the measurement."""

    def ready(self) -> None:
        """The model is there."""

    def done(self, loss: float, norm: float) -> None:
        """A step is done."""


class Lockstep(NoSync):
    """Waits for the parent's word, and times what is done until the next."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        rows.give_back_freed_memory()
        self._base_bytes = rows.resident_bytes()
        self._since = self._cpu_since = 0.0

    def ready(self) -> None:
        rows.give_back_freed_memory()
        Path("/proc/self/clear_refs").write_bytes(b"5")  # the high-water mark starts here
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._send({"ready": True})

    def done(self, loss: float, norm: float) -> None:
        line = {
            "seconds": time.perf_counter() - self._since,
            "cpu_s": time.process_time() - self._cpu_since,
            "loss": loss,
            "norm": norm,
            "peak_bytes": self._peak_bytes(),
        }
        self._send(line)

    def _peak_bytes(self) -> int:
        on_gpu = torch.cuda.max_memory_allocated()
        return on_gpu or rows.resident_bytes("VmHWM") - self._base_bytes

    def _send(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._out, flush=True)
        if not sys.stdin.readline():
            raise SystemExit(0)  # the parent has seen enough
        self._since, self._cpu_since = time.perf_counter(), time.process_time()


# ------------------------------------------------------------------------------- ours


@dataclass(slots=True)
class GivenSteps:
    """A source of the loop whose steps are given; packed by the project's own planner."""

    steps: list[list[Sample]]
    pack_tokens: int
    prefetchable = True

    def sample_ids(self, k: int) -> list[int]:
        """Places of the samples in step k."""
        return list(range(len(self.steps[k - 1])))

    def step(self, k: int) -> list[Any]:
        """Micro-batches: packs of at most `pack_tokens` tokens."""
        import numpy as np

        from posttrain_dist.data.packs.collate import collate
        from posttrain_dist.data.packs.packing import plan_in_order
        from posttrain_dist.flow import Example

        samples = self.steps[k - 1]
        lengths = np.array([len(s.input_ids) for s in samples])
        plan = plan_in_order(lengths, self.pack_tokens, len(samples))
        examples = [
            Example(
                input_ids_L=np.array(s.input_ids, np.int32),
                weight_L=(np.array(s.labels) != IGNORED).astype(np.float32),
                channel=s.channel,
                sample_id=i,
            )
            for i, s in enumerate(samples)
        ]
        return [collate([examples[int(i)] for i in plan[p]]) for p in range(len(plan))]


def ours(
    folder: Path, sync: NoSync, channels: bool = True, compiled: bool = False, dtype: str = "auto"
) -> None:
    """posttrain_dist as `posttrain train engine=single` puts it together (train.py)."""
    from posttrain_dist.build import make_engine, pick_dtype
    from posttrain_dist.config import Dtype, ModelConfig, RunConfig, complete
    from posttrain_dist.dist import Process
    from posttrain_dist.engine import AdamW, Single
    from posttrain_dist.loop import fit
    from posttrain_dist.metrics.sinks import JsonlSink
    from posttrain_dist.metrics.special_tokens import TokenMeter
    from posttrain_dist.metrics.watched_tokens import special_tokens
    from posttrain_dist.models import Checkpointing
    from posttrain_dist.models.folder import load_tokenizer

    sizes, steps = step_data.read_sizes(folder), step_data.read(folder)
    model = ModelConfig(path=str(folder / "model"), compile=compiled)
    if sizes.checkpoint_layers:
        model.activation_checkpointing = Checkpointing.selective
        model.checkpoint_layers = sizes.checkpoint_layers
    optimizer = AdamW(lr=sizes.learning_rate, beta1=BETAS[0], beta2=BETAS[1], clip=CLIP)
    config = complete(RunConfig(model=model, optimizer=optimizer, engine=Single()))
    if not channels:
        steps = [[replace(s, channel=0) for s in step] for step in steps]
    source = GivenSteps(steps, sizes.pack_tokens)
    names = [f"task{i}" for i in range(sizes.channels)] if channels else ["all"]
    chosen = pick_dtype(Dtype[dtype])
    engine = make_engine(config, Process(), chosen)
    attach(config, engine, chosen, names, sizes)
    objective: Any = Sft() if channels else WithoutChannels()
    watched = special_tokens(load_tokenizer(folder / "model"))
    meter = TokenMeter(names, watched, objective, engine.device)
    with tempfile.TemporaryDirectory() as to:
        infos = fit(
            engine=engine,
            source=source,
            objective=objective,
            meter=meter,
            describe=meter.train_metrics,
            learning_rate=lambda _: sizes.learning_rate,
            steps=len(source.steps),
            hooks=(JsonlSink(Path(to) / "metrics.jsonl", 0).write,),
        )
        for info in infos:
            if info.step == 0:
                sync.ready()
            else:
                sync.done(info.metrics["train/loss"], info.metrics["train/grad_norm"])


def attach(config: Any, engine: Any, dtype: torch.dtype, names: list[str], sizes: Sizes) -> None:
    """What `build_policy` does; with peft's LoRA in between where the sizes ask for it."""
    from posttrain_dist.build import build_policy

    if not sizes.lora_rank:
        build_policy(config, engine, dtype, names)
        return
    from peft import inject_adapter_in_model
    from posttrain_kernels import linear_cross_entropy, linear_logprob

    from posttrain_dist.models.folder import resolve
    from posttrain_dist.models.head import HeadKernels
    from posttrain_dist.models.load import load_model
    from posttrain_dist.models.policy import Policy

    model = load_model(
        config.model,
        resolve(config.model.path),
        dtype=dtype,
        seed=config.seed,
        materialise=engine.materialise(),
    )
    model.requires_grad_(False)
    inject_adapter_in_model(step_data.lora(sizes.lora_rank), model)
    kernels = HeadKernels(linear_cross_entropy, linear_logprob)
    engine.attach(Policy(model, kernels, len(names)))


class WithoutChannels(Sft):
    """The same objective, its head not given channels: what channel metrics are compared to."""

    def loss(self, hidden_ND: torch.Tensor, head: Any, batch: Any, denominators: Any) -> Any:
        """The loss with an empty channel table but for its sum, which the log needs."""
        tokens, weight_N = denominators.tokens, batch.weight_N
        result = head.loss(hidden_ND, batch.labels_N, token_weight=weight_N, denominator=tokens)
        loss_sum = float(result.loss.detach()) * tokens
        table_CK = torch.tensor([[loss_sum, batch.weight_sum, 0.0, 0.0]])
        return Loss(result.loss, table_CK, result.nll_N, result.correct_N)


# -------------------------------------------------------------------------- reference


def reference(folder: Path, sync: NoSync) -> None:
    """float32, one sample at a time, transformers' own logits and cross-entropy, torch's AdamW."""
    from transformers import AutoModelForCausalLM

    rate = step_data.read_sizes(folder).learning_rate
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, weight_decay=0.0)
    model.train()
    sync.ready()
    for samples in step_data.read(folder):
        labels = [torch.tensor(s.labels)[1:] for s in samples]
        count = sum(int((x != IGNORED).sum()) for x in labels)
        total = 0.0
        for sample, label in zip(samples, labels, strict=True):
            logits = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, label, reduction="sum") / count
            loss.backward()
            total += loss.item()
        # In float64: on a CPU torch adds up a float32 norm one number after the other, which is
        # off by 2e-3 for six million of them.
        norm_64 = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), CLIP, norm_64.float())
        norm = float(norm_64)
        optimizer.step()
        optimizer.zero_grad()
        sync.done(total, norm)


# -------------------------------------------------------------------------------- TRL

# What of SFTConfig differs from its defaults. Everything else that an arm of TRL sets is the same
# in all of them and changes no speed: the optimizer's numbers, the order of samples, no saving.
FLOAT32 = {"bf16": False}
PLAIN = {**FLOAT32, "gradient_checkpointing": False}


def _batches(size: int, times: int) -> dict[str, Any]:
    return {**PLAIN, "per_device_train_batch_size": size, "gradient_accumulation_steps": times}


TRL: dict[str, dict[str, Any]] = {
    "TRL default": {},
    "TRL default, float32": FLOAT32,
    "TRL 8 x 1": _batches(8, 1),
    "TRL 4 x 2": _batches(4, 2),
    "TRL 2 x 4": _batches(2, 4),
    "TRL 1 x 8": _batches(1, 8),
    "TRL 1 x 8, eager attention": {
        **_batches(1, 8),
        "model_init_kwargs": {"attn_implementation": "eager"},
    },
    "TRL 1 x 8, 1 worker": {**_batches(1, 8), "dataloader_num_workers": 1},
    "TRL 1 x 8, compiled": {**_batches(1, 8), "torch_compile": True},
    "TRL padding-free": {**_batches(8, 1), "padding_free": True, "max_length": None},
}

# On a GPU, where a step has 32 samples. Its float32 weights leave no room for the activations of a
# larger batch unless they are computed again.
TRL_GPU: dict[str, dict[str, Any]] = {
    "TRL default, 8 x 4": {"gradient_accumulation_steps": 4},
    "TRL 1 x 32": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 32,
        "gradient_checkpointing": False,
    },
    "TRL 8 x 4, Liger": {"gradient_accumulation_steps": 4, "use_liger_kernel": True},
    "TRL padding-free, 8 x 4": {
        "gradient_accumulation_steps": 4,
        "padding_free": True,
        "max_length": None,
    },
}


def trl(folder: Path, sync: NoSync, changes: dict[str, Any]) -> None:
    """SFTTrainer 1.16 on the tokenised samples, in their order."""
    import datasets
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    steps, sizes = step_data.read(folder), step_data.read_sizes(folder)
    samples = [s for step in steps for s in step]
    data = datasets.Dataset.from_dict(
        {"input_ids": [s.input_ids for s in samples], "labels": [s.labels for s in samples]}
    )

    class Turn(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            sync.ready()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                sync.done(logs["loss"], logs["grad_norm"])

    with tempfile.TemporaryDirectory() as to:
        config = SFTConfig(
            output_dir=to,
            use_cpu=not torch.cuda.is_available(),
            max_steps=len(steps),
            learning_rate=sizes.learning_rate,
            lr_scheduler_type="constant",
            adam_beta2=BETAS[1],
            max_grad_norm=CLIP,
            train_sampling_strategy="sequential",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **changes,
        )
        SFTTrainer(
            model=str(folder / "model"),
            args=config,
            train_dataset=data,
            peft_config=step_data.lora(sizes.lora_rank) if sizes.lora_rank else None,
            callbacks=[Turn()],
        ).train()


# ------------------------------------------------------------------------------- main


def names() -> Iterator[str]:
    """Every arm."""
    yield from ("reference", "ours", "ours again", "ours, no channels", "ours, compiled", *TRL)
    yield from (f"{arm}, {dtype}" for dtype in FLOOR_DTYPES for arm in ("ours", "products"))


def train(folder: Path, arm: str, sync: NoSync) -> None:
    """Train all steps of a folder with one arm."""
    torch.manual_seed(0)
    if arm == "reference":
        reference(folder, sync)
    elif arm.startswith("products"):
        packs = partial(GivenSteps, pack_tokens=step_data.read_sizes(folder).pack_tokens)
        step_floor.products(folder, sync, packs, getattr(torch, arm.partition(", ")[2]))
    elif arm.startswith("ours"):
        end = arm.partition(", ")[2]
        dtype = end if end in FLOOR_DTYPES else "auto"
        ours(folder, sync, end != "no channels", end == "compiled", dtype)
    else:
        trl(folder, sync, {**TRL, **TRL_GPU}[arm])


def main() -> None:
    folder, arm = Path(sys.argv[1]), sys.argv[2]
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not for the parent
    train(folder / "tiny", arm, NoSync())
    if "--profile" in sys.argv:
        profile = step_floor.Profile(out)
        train(folder, arm, profile)
        profile.print_shares()
        return
    train(folder, arm, Lockstep(out))


if __name__ == "__main__":
    main()
