"""What plan_truth.py measures: small models on a CPU, large ones on a GPU."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plan_truth_models import GEMMA2, GPT2, LLAMA, LLAMA_3B, LLAMA_8B, QWEN3, ZERO

from posttrain_dist.config import (
    AdamW,
    Bottleneck,
    DeepSpeed,
    Dtype,
    Full,
    Ia3,
    Lora,
    Prefix,
    Prompt,
    PTuning,
    Quantize,
    Ray,
    RunConfig,
    complete,
)
from posttrain_dist.models import Checkpointing, Weights
from posttrain_dist.objectives.base import Objective
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.objectives.preference.kto import Kto
from posttrain_dist.objectives.preference.reward import Reward
from posttrain_dist.objectives.reference_choice import Reference
from posttrain_dist.objectives.sft import Sft
from posttrain_dist.tuning.base import AdapterTuning, Tuning
from posttrain_dist.tuning.bottleneck.bottleneck_tuning import Placement


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run; `sample_tokens` are the lengths of the samples of a row.

    Attributes:
        parents: of each sample the earlier one that it follows, -1 of a prompt; empty: none does.
        stage: of DeepSpeed; None: one process without it. `persistent`: its threshold at stage 3.
    """

    model: dict[str, Any] = field(default_factory=lambda: LLAMA)
    sample_tokens: Sequence[int] = (512,)
    parents: Sequence[int] = ()
    supervised_share: float = 0.5
    accumulation: int = 1
    objective: Objective = field(default_factory=Sft)
    tuning: Tuning = field(default_factory=Full)
    dtype: Dtype = Dtype.float32
    checkpoint_layers: int = 0
    gpu: bool = False
    optimizer: AdamW = field(default_factory=AdamW)
    stage: int | None = None
    workers: int = 1
    persistent: int = 0

    @property
    def targets(self) -> float:
        """Supervised tokens of the row: of prompts and answers all of the answers."""
        if not self.parents:
            return sum(self.sample_tokens) * self.supervised_share
        answers = [n for n, p in zip(self.sample_tokens, self.parents, strict=True) if p >= 0]
        return len(answers) if self.objective.own_rows else sum(answers)

    @property
    def updates(self) -> int:
        """After as many, a run's memory is what it stays: ZeRO-3 first traces a whole step."""
        return 4 if self.stage == 3 else 2


def config_of(arm: Arm, folder: Path) -> RunConfig:
    """The completed config of an arm, whose model folder is made in `folder`."""
    if not (folder / "config.json").is_file():  # ranks read it at the same time
        (folder / "config.json").write_text(json.dumps(arm.model), encoding="utf-8")
    config = RunConfig(
        name="plan_truth",
        optimizer=copy.deepcopy(arm.optimizer),
        tuning=copy.deepcopy(arm.tuning),
        objective=copy.deepcopy(arm.objective),
    )
    config.model.path, config.model.weights = str(folder), Weights.random
    quantized = isinstance(arm.tuning, AdapterTuning) and arm.tuning.quantize is Quantize.nf4
    if quantized or arm.stage == 3:
        config.model.weights = Weights.load  # only what is read is quantised, or sharded
        _write_weights(folder)
    config.data.train, config.data.max_length = "embedded", max(arm.sample_tokens)
    config.train.dtype = arm.dtype
    config.train.batch_size = arm.accumulation * arm.workers
    if arm.stage is not None:
        config.engine = DeepSpeed(stage=arm.stage, persistence_threshold=arm.persistent)
        config.cluster = Ray(workers=arm.workers)
    if arm.checkpoint_layers:
        config.model.activation_checkpointing = Checkpointing.selective
        config.model.checkpoint_layers = arm.checkpoint_layers
    return complete(config)


def _write_weights(folder: Path) -> None:
    """Random weights for the config.json of a folder."""
    if (folder / "model.safetensors").is_file():
        return
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def of_this_machine() -> list[str]:
    """Names of the arms for a GPU where there is one, else of those for a CPU."""
    import torch

    return [name for name, arm in ARMS.items() if arm.gpu is torch.cuda.is_available()]


def _llama(**sizes: Any) -> dict[str, Any]:
    return LLAMA | sizes


_LONG = (6144,)
# Rows of samples of unequal lengths, and of many short ones.
_UNEVEN = (512, 256, *(64,) * 8, *(24,) * 16)
_SHORT = (40,) * 24
_NARROW = _llama(hidden_size=128, intermediate_size=352, num_attention_heads=4, head_dim=32)
_BF16 = Dtype.bfloat16


def _zero(stage: int, workers: int = 2, **values: Any) -> Arm:
    return Arm(**({"model": ZERO, "stage": stage, "workers": workers} | values))


def _qlora(rank: int) -> Lora:
    return Lora(rank=rank, quantize=Quantize.nf4)


_TIED = ZERO | {"vocab_size": 32_768, "tie_word_embeddings": True}
_DEEP = LLAMA | {"num_hidden_layers": 10}
_SOME_LAYERS = Full(train="model[.]layers[.][45][.].*")
_EVERY_LAYER = {"checkpoint_layers": 4, "sample_tokens": (1024,), "accumulation": 2}
_ZERO: dict[str, Arm] = {
    # Stages and workers.
    **{f"zero-{s} on {n}": _zero(s, n) for s, n in itertools.product(range(4), (1, 2))},
    # Of each stage, on two workers.
    **{f"zero-{s} lora rank 8": _zero(s, tuning=Lora(rank=8)) for s in range(4)},
    **{f"zero-{s} recomputed 2 x 1024": _zero(s, **_EVERY_LAYER) for s in range(4)},
    **{f"zero-{s} bf16": _zero(s, dtype=_BF16) for s in range(4)},
    "zero-2 recomputed 2 x 256": _zero(2, **_EVERY_LAYER | {"sample_tokens": (256,)}),
    "zero-2 1024": _zero(2, sample_tokens=(1024,)),
    "zero-3 1024": _zero(3, sample_tokens=(1024,)),
    "zero-2 lora rank 64": _zero(2, tuning=Lora(rank=64)),
    "zero-3 lora bf16": _zero(3, tuning=Lora(rank=8), dtype=_BF16),
    "zero-3 small ones stay": _zero(3, persistent=100_000),
    "zero-3 4096": _zero(3, model=_NARROW, sample_tokens=(4096,)),
    **{f"zero-{s} tied": _zero(s, model=_TIED, accumulation=2) for s in range(4)},
    "zero-3 layers 4 and 5": _zero(3, model=_DEEP, tuning=_SOME_LAYERS),
    "zero-3 tied lora": _zero(3, model=_TIED, tuning=Lora(rank=8)),
    "zero-1 tied lora bf16": _zero(1, model=_TIED, tuning=Lora(rank=8), dtype=_BF16),
    "zero-3 tied bf16": _zero(3, model=_TIED, dtype=_BF16, accumulation=2),
    "zero-3 dora": _zero(3, tuning=Lora(rank=8, dora=True)),
    "zero-3 qlora": _zero(3, model=LLAMA, tuning=_qlora(8)),
    "zero-3 ia3": _zero(3, tuning=Ia3()),
    "zero-3 prompt": _zero(3, tuning=Prompt(tokens=64), sample_tokens=(256, 256)),
    "zero-3 prefix": _zero(3, tuning=Prefix(tokens=64), sample_tokens=(256, 256)),
    "zero-3 bottleneck": _zero(3, tuning=Bottleneck()),
    "zero-2 prefix": _zero(2, tuning=Prefix(tokens=64), sample_tokens=(256, 256)),
    "zero-3 gemma2": _zero(3, model=GEMMA2),
}


def _pairs(objective: Objective | None = None, **values: Any) -> Arm:
    """Two prompts with two answers each."""
    row = {"sample_tokens": (192, 64, 48, 128, 48, 32), "parents": (-1, 0, 0, -1, 3, 3)}
    return Arm(**{"objective": objective or Dpo(sft_weight=0.5), **row, **values})


_GROUP = {"sample_tokens": (256, *(32,) * 8), "parents": (-1, *(0,) * 8)}
PREFERENCES: dict[str, Arm] = {
    "dpo": _pairs(),
    "dpo lora": _pairs(tuning=Lora(rank=16)),
    "dpo frozen": _pairs(Dpo(reference=Reference.frozen)),
    "dpo lora frozen bf16": _pairs(Dpo(reference=Reference.frozen), tuning=Lora(), dtype=_BF16),
    "dpo bf16": _pairs(dtype=_BF16, accumulation=2),
    "dpo checkpoint 3": _pairs(checkpoint_layers=3),
    "dpo tied": _pairs(model=_llama(vocab_size=32_768, tie_word_embeddings=True)),
    "dpo qlora": _pairs(tuning=_qlora(16)),
    "dpo group of 8": _pairs(**_GROUP),
    "dpo gemma2": _pairs(model=GEMMA2, **_GROUP),
    "dpo prompt": _pairs(tuning=Prompt(tokens=64)),
    "dpo prefix": _pairs(tuning=Prefix(tokens=64)),
    "reward": _pairs(Reward()),
    "reward tied bf16": _pairs(Reward(), model=_llama(tie_word_embeddings=True), dtype=_BF16),
    "reward lora": _pairs(Reward(), tuning=Lora(rank=16)),
    "reward zero-3": _pairs(Reward(), model=ZERO, stage=3, workers=2),
    "kto lora": _pairs(Kto(), tuning=Lora(rank=16)),
    **{f"dpo zero-{s}": _pairs(model=ZERO, stage=s, workers=2) for s in range(4)},
    "dpo zero-3 frozen": _pairs(Dpo(reference=Reference.frozen), model=ZERO, stage=3, workers=2),
    "dpo zero-2 frozen": _pairs(Dpo(reference=Reference.frozen), model=ZERO, stage=2, workers=2),
}
CPU: dict[str, Arm] = {
    **PREFERENCES,
    # Lengths.
    "llama": Arm(),
    "llama 1024": Arm(sample_tokens=(1024,)),
    "llama 2048": Arm(sample_tokens=(2048,)),
    "llama 6144": Arm(model=_NARROW, sample_tokens=_LONG),
    "llama 256": Arm(sample_tokens=(256,)),
    "llama narrow 512": Arm(model=_NARROW),
    # Rows of several samples, micro-batches.
    "llama 2 x 512": Arm(sample_tokens=(512, 512)),
    "llama 12 x 128": Arm(sample_tokens=(128,) * 12),
    "llama accumulation 2": Arm(accumulation=2),
    "llama accumulation 4": Arm(accumulation=4, sample_tokens=(384,)),
    # Checkpointing.
    "llama checkpoint 1": Arm(sample_tokens=(1024,), checkpoint_layers=1),
    "llama checkpoint 2": Arm(sample_tokens=(1024,), checkpoint_layers=2),
    "llama checkpoint 3": Arm(sample_tokens=(1024,), checkpoint_layers=3),
    "llama 6144 checkpoint 3": Arm(model=_NARROW, sample_tokens=_LONG, checkpoint_layers=3),
    # bfloat16.
    "llama bf16": Arm(dtype=_BF16, sample_tokens=(256,)),
    "llama bf16 512": Arm(dtype=_BF16),
    "llama bf16 checkpoint 3": Arm(dtype=_BF16, checkpoint_layers=3),
    "llama bf16 tied": Arm(dtype=_BF16, model=_llama(tie_word_embeddings=True)),
    # Some of the parameters.
    "layers 4 and 5": Arm(model=_DEEP, tuning=_SOME_LAYERS),
    "last 3 layers and head": Arm(model=_DEEP, tuning=Full(train="model.layers.[789].*|lm_head.*")),
    "norms": Arm(tuning=Full(train=".*norm.*")),
    "every other layer": Arm(model=_DEEP, tuning=Full(train="model.layers.[02468][.].*")),
    "embeddings": Arm(tuning=Full(train=".*embed_tokens.*")),
    # Adapters.
    "lora rank 8": Arm(tuning=Lora(rank=8)),
    "lora rank 16": Arm(tuning=Lora(rank=16)),
    "lora rank 64": Arm(tuning=Lora(rank=64)),
    "lora 1024": Arm(tuning=Lora(rank=16), sample_tokens=(1024,)),
    "lora 6144": Arm(tuning=Lora(rank=16), model=_NARROW, sample_tokens=_LONG),
    "lora checkpoint 3": Arm(tuning=Lora(), sample_tokens=(1024,), checkpoint_layers=3),
    "lora attention": Arm(tuning=Lora(targets="attention")),
    "lora dropout": Arm(tuning=Lora(dropout=0.1)),
    "lora bf16": Arm(tuning=Lora(), dtype=_BF16, sample_tokens=(256,)),
    "dora": Arm(tuning=Lora(dora=True)),
    "lora head": Arm(tuning=Lora(targets=["q_proj", "lm_head"])),
    "ia3": Arm(tuning=Ia3()),
    "prompt": Arm(tuning=Prompt(tokens=64), sample_tokens=(256, 256)),
    "p_tuning": Arm(tuning=PTuning(tokens=64), sample_tokens=(256, 256)),
    "prefix": Arm(tuning=Prefix(tokens=64), sample_tokens=(256, 256)),
    "prompt 24 x 40": Arm(tuning=Prompt(tokens=64), sample_tokens=_SHORT),
    "p_tuning 24 x 40": Arm(tuning=PTuning(tokens=64), sample_tokens=_SHORT),
    "prefix 24 x 40": Arm(tuning=Prefix(tokens=64), sample_tokens=_SHORT),
    "prefix uneven": Arm(tuning=Prefix(tokens=64), sample_tokens=_UNEVEN),
    "bottleneck houlsby": Arm(tuning=Bottleneck(placement=Placement.houlsby)),
    "bottleneck parallel": Arm(tuning=Bottleneck(placement=Placement.parallel, reduction=4)),
    # DeepSpeed.
    **_ZERO,
    # A base in NF4.
    "qlora rank 8": Arm(tuning=_qlora(8)),
    "qlora rank 16": Arm(tuning=_qlora(16)),
    "qlora rank 64": Arm(tuning=_qlora(64)),
    "qlora 4096": Arm(
        tuning=_qlora(16), model=_NARROW | {"intermediate_size": 384}, sample_tokens=(4096,)
    ),
    "qlora checkpoint 3": Arm(tuning=_qlora(16), sample_tokens=(1024,), checkpoint_layers=3),
    "qlora bf16": Arm(tuning=_qlora(16), dtype=_BF16, sample_tokens=(256,)),
    "qdora": Arm(tuning=Lora(quantize=Quantize.nf4, dora=True)),
    "ia3 nf4": Arm(tuning=Ia3(quantize=Quantize.nf4)),
    "prompt nf4": Arm(tuning=Prompt(tokens=64, quantize=Quantize.nf4), sample_tokens=(256, 256)),
    "prefix nf4": Arm(tuning=Prefix(tokens=64, quantize=Quantize.nf4), sample_tokens=(256, 256)),
    "bottleneck nf4": Arm(tuning=Bottleneck(quantize=Quantize.nf4)),
    # Architectures.
    "qwen3": Arm(model=QWEN3),
    "qwen3 2048": Arm(model=QWEN3, sample_tokens=(2048,)),
    "gemma2": Arm(model=GEMMA2),
    "gemma2 1024": Arm(model=GEMMA2, sample_tokens=(1024,)),
    "gemma2 uneven": Arm(model=GEMMA2, sample_tokens=_UNEVEN),
    "gemma2 uneven checkpoint 3": Arm(model=GEMMA2, sample_tokens=_UNEVEN, checkpoint_layers=3),
    "gemma2 24 x 40": Arm(model=GEMMA2, sample_tokens=_SHORT),
    "gemma2 bf16 uneven": Arm(model=GEMMA2, sample_tokens=_UNEVEN, dtype=_BF16),
    "gemma2 prompt uneven": Arm(model=GEMMA2, tuning=Prompt(tokens=16), sample_tokens=_UNEVEN),
    "gpt2": Arm(model=GPT2),
    "gpt2 1024": Arm(model=GPT2, sample_tokens=(1024,)),
    # Shapes.
    "llama tied": Arm(model=_llama(tie_word_embeddings=True)),
    "llama 32768 words": Arm(model=_llama(vocab_size=32_768), supervised_share=1.0),
    "llama 32768 words tied": Arm(model=_llama(vocab_size=32_768, tie_word_embeddings=True)),
    "llama 8 layers": Arm(model=_llama(num_hidden_layers=8)),
    "llama full heads": Arm(model=_llama(num_key_value_heads=8)),
    "llama one head shared": Arm(model=_llama(num_key_value_heads=1)),
    "llama wide heads": Arm(model=_llama(head_dim=64)),
    "llama biases": Arm(model=_llama(attention_bias=True, mlp_bias=True)),
    "llama wide mlp": Arm(model=_llama(intermediate_size=1408)),
    # Masks.
    "llama all supervised": Arm(supervised_share=1.0),
    "llama tenth supervised": Arm(supervised_share=0.1),
}


def _gpu(**values: Any) -> Arm:
    return Arm(**({"model": LLAMA_3B, "dtype": _BF16, "gpu": True} | values))


GPU: dict[str, Arm] = {
    "3B full 2048": _gpu(sample_tokens=(2048,)),
    "3B full 8192": _gpu(sample_tokens=(8192,)),
    "3B full 8 x 1024": _gpu(sample_tokens=(1024,) * 8),
    "3B full 8192 checkpoint 28": _gpu(sample_tokens=(8192,), checkpoint_layers=28),
    "3B full 16384 checkpoint 14": _gpu(sample_tokens=(16_384,), checkpoint_layers=14),
    "3B full accumulation 2": _gpu(sample_tokens=(4096,), accumulation=2),
    "3B full all supervised": _gpu(sample_tokens=(8192,), supervised_share=1.0),
    "3B DPO 4096 + 2 x 2048": _gpu(
        sample_tokens=(4096, 2048, 2048), parents=(-1, 0, 0), objective=Dpo()
    ),
    "3B LoRA 8192": _gpu(sample_tokens=(8192,), tuning=Lora()),
    "8B LoRA 4096": _gpu(model=LLAMA_8B, sample_tokens=(4096,), tuning=Lora()),
    "8B LoRA 8192 checkpoint 32": _gpu(
        model=LLAMA_8B, sample_tokens=(8192,), tuning=Lora(), checkpoint_layers=32
    ),
    "8B LoRA 32768 checkpoint 32": _gpu(
        model=LLAMA_8B, sample_tokens=(32_768,), tuning=Lora(), checkpoint_layers=32
    ),
    "8B DoRA 4096": _gpu(model=LLAMA_8B, sample_tokens=(4096,), tuning=Lora(rank=16, dora=True)),
}
ARMS: dict[str, Arm] = CPU | GPU
# Neighbours that differ in one thing: the planner must predict the difference.
PAIRS = (
    ("llama 256", "llama"),
    ("llama", "llama 1024"),
    ("llama 1024", "llama 2048"),
    ("llama narrow 512", "llama 6144"),
    ("llama", "llama 2 x 512"),
    ("llama tenth supervised", "llama all supervised"),
    ("llama 1024", "llama checkpoint 1"),
    ("llama checkpoint 1", "llama checkpoint 2"),
    ("llama 1024", "llama checkpoint 3"),
    ("llama 6144", "llama 6144 checkpoint 3"),
    ("llama tied", "llama"),
    ("llama", "llama 8 layers"),
    ("llama", "llama wide mlp"),
    ("llama bf16", "llama bf16 512"),
    ("lora rank 8", "lora rank 16"),
    ("lora rank 16", "lora rank 64"),
    ("lora rank 16", "lora 1024"),
    ("lora rank 16", "llama"),
    ("lora rank 16", "dora"),
    ("lora rank 16", "lora dropout"),
    ("lora attention", "lora rank 16"),
    ("ia3", "lora rank 16"),
    ("prompt", "prefix"),
    ("bottleneck houlsby", "lora rank 16"),
    ("qlora rank 16", "lora rank 16"),
    ("qlora rank 8", "qlora rank 16"),
    ("qlora rank 16", "qlora rank 64"),
    ("qlora rank 16", "qdora"),
    ("ia3 nf4", "qlora rank 16"),
    ("bottleneck nf4", "qlora rank 16"),
    ("lora 1024", "lora checkpoint 3"),
    ("qwen3", "qwen3 2048"),
    ("gemma2", "gemma2 1024"),
    ("gpt2", "gpt2 1024"),
    ("gemma2", "gemma2 uneven"),
    ("gemma2 24 x 40", "gemma2 uneven"),
    ("prompt", "prompt 24 x 40"),
    ("prefix", "prefix 24 x 40"),
    *((f"zero-{s} on 2", f"zero-{s} on 1") for s in (1, 2, 3)),
    *((f"zero-{s} on 2", f"zero-{s + 1} on 2") for s in (0, 2)),  # full in forward: 1 is as 2
    *((f"zero-{s} on 2", f"zero-{s} 1024") for s in (2, 3)),
    *((f"zero-{s} 1024", f"zero-{s} recomputed 2 x 1024") for s in (2, 3)),
    *((f"zero-{s} on 2", f"zero-{s} lora rank 8") for s in range(4)),
    *((f"zero-{s} bf16", f"zero-{s} on 2") for s in range(4)),
    ("zero-2 recomputed 2 x 256", "zero-2 recomputed 2 x 1024"),
    ("zero-2 lora rank 8", "zero-2 lora rank 64"),
    ("zero-3 lora bf16", "zero-3 lora rank 8"),
    ("zero-3 on 2", "zero-3 small ones stay"),
)
