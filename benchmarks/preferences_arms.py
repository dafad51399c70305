"""One arm of preferences_trl.py, a process of its own: it trains a step of pairs a line of stdin.

    python benchmarks/preferences_arms.py <folder> <arm>

As step_arms.py, whose protocol it speaks. Both train the same random Llama on the same pairs of
tokens, with full tuning, AdamW and a constant rate, in float32.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import step_data
import torch
from step_arms import BETAS, CLIP, Lockstep, NoSync
from step_data import MAX_LENGTH, Sizes

BETA, PROMPT_SHARE = 0.1, 0.7
Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids: as TRL calls them


# ------------------------------------------------------------------------------- data


def make_pairs(sizes: Sizes, kind: str, steps: int, seed: int = 0) -> list[list[Pair]]:
    """`steps` lists of pairs: "equal" (256 tokens with the prompt) or "mixed" (lognormal)."""
    draw = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return np.minimum(draw.zipf(1.2, length), sizes.vocabulary - 1).tolist()

    def pair() -> Pair:
        length = sizes.uniform_length
        spread = 0.0
        if kind == "mixed":
            length, spread = int(np.exp(draw.normal(sizes.mean_log_length, 0.9))), 0.5
        length = min(max(length, 16), MAX_LENGTH)
        prompt = round(PROMPT_SHARE * length)
        answers = np.exp(draw.normal(0, spread, 2)) * (length - prompt)
        lengths = np.clip(answers.round().astype(int), 2, MAX_LENGTH - prompt).tolist()
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        return {key: ids(n) for key, n in zip(keys, (prompt, *lengths), strict=True)}

    return [[pair() for _ in range(sizes.samples)] for _ in range(steps)]


def counts(steps: list[list[Pair]]) -> dict[str, float]:
    """Tokens of a step, each prompt twice as peers have it, and what of it padding and sharing are.

    Returns:
        "tokens_per_step"; "padding_factor", with all pairs of a step in one batch;
        "shared_factor", tokens with the prompt once over those with it twice.
    """
    rows = [
        [len(p["prompt_ids"]) + len(p[key]) for p in step for key in ("chosen_ids", "rejected_ids")]
        for step in steps
    ]
    tokens = sum(map(sum, rows))
    prompts = sum(len(p["prompt_ids"]) for step in steps for p in step)
    padded = sum(len(row) * max(row) for row in rows)
    return {
        "tokens_per_step": tokens / len(steps),
        "padding_factor": padded / tokens,
        "shared_factor": (tokens - prompts) / tokens,
    }


def write(folder: Path, sizes: Sizes, kind: str, steps: int) -> dict[str, float]:
    """Write `model/`, `pairs.json` and `sizes.json` into `folder`, and the same tiny ones."""
    found: dict[str, float] = {}
    for place, size, count in ((folder / "tiny", step_data.TINY, 2), (folder, sizes, steps)):
        found = {"parameters": step_data.write_model(place, size)}
        pairs = make_pairs(size, kind, count)
        (place / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
        found |= counts(pairs)
    return found


def read(folder: Path) -> list[list[Pair]]:
    """The pairs that `write` wrote."""
    found: list[list[Pair]] = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    return found


# ------------------------------------------------------------------------------- ours


@dataclass(slots=True)
class GivenPairs:
    """A source of the loop whose steps are given, packed by the project's own planner."""

    steps: list[list[Any]]  # of each step its batches
    prefetchable = True

    def sample_ids(self, k: int) -> list[int]:
        """None are named."""
        return []

    def step(self, k: int) -> list[Any]:
        """Micro-batches of step k."""
        return self.steps[k - 1]


def batches_of(pairs: list[Pair], pack_tokens: int) -> list[Any]:
    """Packs of the pairs of a step, each prompt once."""
    from posttrain_dist.data.packs.collate import collate
    from posttrain_dist.data.packs.packing import plan_in_order
    from posttrain_dist.flow import Example

    units = []
    for number, pair in enumerate(pairs):
        unit = []
        for i, key in enumerate(("prompt_ids", "chosen_ids", "rejected_ids")):
            length = len(pair[key])
            unit.append(
                Example(
                    input_ids_L=np.array(pair[key], np.int32),
                    weight_L=np.full(length, float(i > 0), np.float32),
                    channel=0,
                    sample_id=3 * number + i,
                    extra={"role_S": min(i, 1) - 1, "value_S": float(i == 1), "margin_S": 0.0},
                    parent=3 * number if i else None,
                    unit=number,
                )
            )
        units.append(unit)
    lengths = np.array([sum(len(e.input_ids_L) for e in unit) for unit in units])
    plan = plan_in_order(lengths, max(pack_tokens, int(lengths.max())), len(units))
    return [collate([e for i in plan[p] for e in units[int(i)]]) for p in range(len(plan))]


def ours(folder: Path, sync: NoSync, dtype: str = "float32") -> None:
    """posttrain_dist with the reference computed before step 1, as `objective=dpo` does."""
    from posttrain_dist.build import build_policy, make_engine
    from posttrain_dist.config import ModelConfig, RunConfig, complete
    from posttrain_dist.dist import Process
    from posttrain_dist.engine import AdamW, Single
    from posttrain_dist.loop import fit
    from posttrain_dist.metrics.special_tokens import TokenMeter
    from posttrain_dist.objectives.preference.dpo import Dpo
    from posttrain_dist.reference.log_probs import log_probs

    sizes = step_data.read_sizes(folder)
    optimizer = AdamW(lr=sizes.learning_rate, beta1=BETAS[0], beta2=BETAS[1], clip=CLIP)
    model = ModelConfig(path=str(folder / "model"))
    config = complete(
        RunConfig(model=model, objective=Dpo(beta=BETA), optimizer=optimizer, engine=Single())
    )
    chosen = getattr(torch, dtype)
    engine = make_engine(config, Process(), chosen)
    build_policy(config, engine, chosen, ["all"])
    steps = [batches_of(pairs, sizes.pack_tokens) for pairs in read(folder)]
    began = time.perf_counter()
    engine.train(False)
    for batches in steps:
        for batch in batches:
            row = batch.to(engine.device)
            batch.extra["ref_logprob_N"] = log_probs(engine.forward, row).cpu()
    sync.pass_s = time.perf_counter() - began  # type: ignore[attr-defined]
    meter = TokenMeter(["all"], {}, config.objective, engine.device)
    infos = fit(
        engine=engine,
        source=GivenPairs(steps),
        objective=config.objective,
        meter=meter,
        describe=meter.train_metrics,
        learning_rate=lambda _: sizes.learning_rate,
        steps=len(steps),
    )
    for info in infos:
        if info.step == 0:
            sync.ready()
        else:
            sync.done(info.metrics["train/loss"], info.metrics["train/grad_norm"])


# -------------------------------------------------------------------------------- TRL

FLOAT32 = {"bf16": False}
PLAIN = {**FLOAT32, "gradient_checkpointing": False}
BEFORE = {**PLAIN, "precompute_ref_log_probs": True}


def _batches(size: int, times: int) -> dict[str, Any]:
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": times}


# What of DPOConfig differs from its defaults, beside what all arms share. Its padding_free does
# nothing in 1.16: it warns and pads.
TRL: dict[str, dict[str, Any]] = {
    "TRL default": {},
    "TRL default, float32": FLOAT32,
    "TRL 8 x 1": PLAIN,
    "TRL 8 x 1, reference before": BEFORE,
    "TRL 4 x 2, reference before": {**BEFORE, **_batches(4, 2)},
    "TRL 2 x 4, reference before": {**BEFORE, **_batches(2, 4)},
    "TRL 1 x 8, reference before": {**BEFORE, **_batches(1, 8)},
    "TRL 1 x 8, reference before, compiled": {**BEFORE, **_batches(1, 8), "torch_compile": True},
}


def trl(folder: Path, sync: NoSync, changes: dict[str, Any]) -> None:
    """DPOTrainer 1.16 on the tokenised pairs, in their order."""
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    steps, sizes = read(folder), step_data.read_sizes(folder)
    data = datasets.Dataset.from_list([pair for step in steps for pair in step])

    class Turn(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            sync.pass_s = time.perf_counter() - began  # type: ignore[attr-defined]
            sync.ready()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                sync.done(logs["loss"], logs["grad_norm"])

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    with tempfile.TemporaryDirectory() as to:
        config = DPOConfig(
            output_dir=to,
            use_cpu=not torch.cuda.is_available(),
            max_steps=len(steps),
            learning_rate=sizes.learning_rate,
            lr_scheduler_type="constant",
            adam_beta2=BETAS[1],
            max_grad_norm=CLIP,
            optim="adamw_torch",
            beta=BETA,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            **changes,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        began = time.perf_counter()
        Tokenised(
            model=str(folder / "model"),
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Turn()],
        ).train()


# ------------------------------------------------------------------------------- main


class Timed(Lockstep):
    """Also says how long the pass for the reference took, where there is one."""

    pass_s = 0.0

    def _send(self, line: dict[str, Any]) -> None:
        super()._send({**line, "pass_s": self.pass_s})


def train(folder: Path, arm: str, sync: NoSync) -> None:
    """Train all steps of a folder with one arm."""
    torch.manual_seed(0)
    if arm.startswith("ours"):
        ours(folder, sync, arm.partition(", ")[2] or "float32")
    else:
        trl(folder, sync, TRL[arm])


def main() -> None:
    folder, arm = Path(sys.argv[1]), sys.argv[2]
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not for the parent
    train(folder / "tiny", arm, NoSync())
    train(folder, arm, Timed(out))


if __name__ == "__main__":
    main()
