"""Policies with virtual tokens, whose values are random and far from zero."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob
from safetensors.torch import save_file

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.flow import Example, Loss
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.base import Tuning
from posttrain_dist.tuning.prefix_tuning import Prefix
from posttrain_dist.tuning.prompt_tuning import Prompt, PTuning

TUNINGS = {"prompt": Prompt, "p_tuning": PTuning, "prefix": Prefix}


def policy_of(folder, tuning: Tuning | None, spread: float = 0.5, **model) -> Policy:
    """The policy of a model folder; trained values are drawn again, of that standard deviation."""
    causal_lm = load_model(
        ModelConfig(path=str(folder), **model),
        folder,
        dtype=torch.float32,
        seed=0,
        materialise=nullcontext(),
        attach=(lambda model: None) if tuning is None else tuning.attach,
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in causal_lm.named_parameters():
            if tuning is not None and tuning.trained(name) and spread:
                parameter.normal_(std=spread, generator=draw)
    kernels = HeadKernels(linear_cross_entropy, linear_logprob)
    return Policy(causal_lm, kernels, num_channels=2, tuning=tuning).eval()


def examples() -> list[Example]:
    """Three roots, the second followed by two samples."""
    draw = np.random.default_rng(0)
    made = []
    for sample_id, (length, parent) in enumerate(
        [(7, None), (11, None), (4, 1), (6, 1), (9, None)]
    ):
        ids_L = draw.integers(5, 200, length).astype(np.int32)
        weight_L = draw.choice([0.0, 0.5, 1.0], length).astype(np.float32)
        weight_L[0], weight_L[-1] = parent is not None, 1
        made.append(Example(ids_L, weight_L, sample_id % 2, sample_id, parent=parent))
    return made


def alone(rows: list[Example]) -> list[Example]:
    """Each sample by itself, behind the tokens of its parent, which are not supervised."""
    made = []
    for row in rows:
        before = [] if row.parent is None else [rows[row.parent]]
        ids_L = np.concatenate([r.input_ids_L for r in (*before, row)])
        masked = [np.zeros_like(r.weight_L) for r in before]
        weight_L = np.concatenate([*masked, row.weight_L])
        made.append(Example(ids_L, weight_L, row.channel, row.sample_id))
    return made


def step(policy: Policy, rows: list[Example]) -> tuple[Loss, dict[str, torch.Tensor]]:
    """Loss and trained gradients of one packed row."""
    policy.zero_grad()
    loss = policy(collate(rows), TokenLoss(), TokenCount(3.0))
    loss.total.backward()
    named = policy.causal_lm.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


def kept(policy: Policy, tuning: Tuning) -> dict[str, torch.Tensor]:
    named = policy.causal_lm.named_parameters()
    return {name: p.detach() for name, p in named if tuning.kept(name)}


def write_peft(folder, saved) -> None:
    """An adapter folder in the layout of `peft`."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(saved.config))
    tensors = {name: tensor.contiguous() for name, tensor in saved.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def peft_logits(folder, adapter, ids_L, num: int) -> torch.Tensor:
    """Logits [L, V] of plain transformers and plain `peft`, on one row that is not packed."""
    import transformers
    from peft import PeftModel

    own = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model = PeftModel.from_pretrained(own, adapter).eval()
    ids = torch.from_numpy(ids_L).long()[None]
    with torch.no_grad():
        return model(input_ids=ids).logits[0, num:]


def logits_of(policy: Policy, ids_L) -> torch.Tensor:
    """The policy's own logits [L, V] of one sample, the slots left out."""
    weight_L = np.ones(len(ids_L), np.float32)
    row = policy._extended(collate([Example(ids_L, weight_L, 0, 0)]))
    with torch.no_grad():
        logits = policy.causal_lm(**policy._inputs(row)).logits[0]
    return logits[len(logits) - len(ids_L) :]
