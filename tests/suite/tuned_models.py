"""Policies with a tuning, rows for them, and the same through plain `peft`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob
from safetensors.torch import save_file

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.engine import AdamW
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.flow import Batch, Example
from posttrain_dist.models import Attention, ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.base import SavedAdapter, Tuning

KERNELS = HeadKernels(linear_cross_entropy, linear_logprob)


def examples(lengths: tuple[int, ...] = (7, 17, 2, 11), seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    made = []
    for sample_id, length in enumerate(lengths):
        ids_L = draw.integers(5, 200, length).astype(np.int32)
        weight_L = (draw.random(length) < 0.7).astype(np.float32)
        weight_L[0], weight_L[-1] = 0, 1
        made.append(Example(ids_L, weight_L, 0, sample_id))
    return made


def tuned_model(folder: Path, tuning: Tuning, dtype: torch.dtype = torch.float32, **model: Any):
    """The causal LM of a folder with the tuning attached; `nf4` is a keyword of `load_model`."""
    from contextlib import nullcontext

    loading = {key: model.pop(key) for key in ("nf4",) if key in model}
    return load_model(
        ModelConfig(path=str(folder), attention=Attention.eager, **model),
        folder,
        dtype=dtype,
        seed=0,
        materialise=nullcontext(),
        attach=tuning.attach,
        **loading,
    )


def tuned_policy(folder: Path, tuning: Tuning, **options: Any) -> Policy:
    return Policy(tuned_model(folder, tuning, **options), KERNELS, 1, tuning).eval()


def engine_of(policy: Policy) -> SingleEngine:
    engine = SingleEngine(AdamW(clip=0.0), torch.device("cpu"))
    engine.attach(policy)
    return engine


def scatter(model: torch.nn.Module, tuning: Tuning, size: float = 0.1) -> None:
    """Move everything trained away from its start, the same way each time."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if tuning.trained(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def run(policy: Policy, batch: Batch, denominator: float = 20.0):
    """(loss of each target, gradients of what is trained)."""
    policy.zero_grad()
    loss = policy(batch, TokenLoss(), TokenCount(denominator))
    loss.total.backward()
    gradients = {n: p.grad for n, p in policy.causal_lm.named_parameters() if p.requires_grad}
    return loss.nll_N[: batch.num_targets].detach(), gradients


def kept_of(policy: Policy, tuning: Tuning) -> dict[str, torch.Tensor]:
    """What a checkpoint of the tuning holds."""
    return {n: t.clone() for n, t in engine_of(policy).full_tensors(tuning.kept)}


def write_folder(folder: Path, saved: SavedAdapter, base: Path) -> Path:
    """The adapter as a folder for plain peft."""
    folder.mkdir()
    config = {**saved.config, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(saved.tensors), folder / "adapter_model.safetensors")
    return folder


def peft_logits(base: Path, adapter: Path | None, ids: torch.Tensor) -> torch.Tensor:
    """Logits [L, V] of one row by transformers and peft alone; None: without adapter."""
    import peft
    import transformers

    own = transformers.AutoModelForCausalLM.from_pretrained(
        base, attn_implementation="eager", dtype=torch.float32
    )
    if adapter is not None:
        own = peft.PeftModel.from_pretrained(own, str(adapter))
    with torch.no_grad():
        return own.eval()(input_ids=ids[None]).logits[0]


def policy_logits(policy: Policy, row: Example) -> torch.Tensor:
    """Logits [L, V] of one row, by the model inside a policy."""
    batch = collate([row])
    with torch.no_grad():
        return policy.causal_lm(**policy._inputs(batch)).logits[0]
