"""Samples that follow another have the loss, and give the gradients, that they have behind it."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Example
from posttrain_dist.models import Attention, ModelConfig
from posttrain_dist.models import varlen as kernels
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss

# Windows so short that a child's queries do not see all of its parent.
CASES = {
    "Llama": (Attention.sdpa, {}),
    "Llama eager": (Attention.eager, {}),
    "Mistral": (Attention.sdpa, {"sliding_window": 6}),
    "Gemma2": (
        Attention.eager,
        {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
}
# sample id -> (tokens, parent): two answers of a prompt, one that goes on, a root between them.
TREE = {7: (9, None), 8: (4, 7), 9: (8, None), 10: (6, 7), 11: (5, 10), 12: (1, 7)}


@pytest.fixture(params=CASES)
def case(request, tmp_path, builders):
    attention, changes = CASES[request.param]
    name = request.param.partition(" ")[0]
    return builders.model(tmp_path / "model", architecture=name, **changes), attention


def examples() -> list[Example]:
    draw = np.random.default_rng(0)
    made = []
    for sample_id, (length, parent) in TREE.items():
        weight_L = draw.choice([0.0, 0.5, 1.0], length).astype(np.float32)
        weight_L[0] = 0 if parent is None else 2.0  # which the parent's last token predicts
        ids_L = draw.integers(5, 200, length).astype(np.int32)
        made.append(Example(ids_L, weight_L, sample_id % 2, sample_id, parent=parent))
    return made


def chain(rows: dict[int, Example], sample_id: int) -> list[Example]:
    """A sample behind all that it follows."""
    row = rows[sample_id]
    return [*(chain(rows, row.parent) if row.parent is not None else []), row]


def test_losses_and_gradients_are_those_of_parent_and_child_alone(case):
    import transformers

    folder, attention = case
    batch = collate(examples())
    assert batch.parent_S == [-1, 0, -1, 0, 3, 0]
    starts = batch.cu_seqlens_S[:-1]
    assert batch.position_ids_T[starts].tolist() == [0, 9, 0, 9, 15, 9]
    config = ModelConfig(path=str(folder), attention=attention)
    model = load_model(config, folder, dtype=torch.float32, seed=0, materialise=nullcontext())
    policy = Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), num_channels=2)
    loss = policy(batch, TokenLoss(), TokenCount(3.0))
    loss.total.backward()

    own = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    rows = {row.sample_id: row for row in examples()}
    expected, total = [], torch.zeros(())
    for row in rows.values():
        whole = chain(rows, row.sample_id)
        ids = torch.from_numpy(np.concatenate([r.input_ids_L for r in whole])).long()
        logits = own(input_ids=ids[None]).logits[0]
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        nll = torch.cat([torch.zeros(1), nll])[-len(row.input_ids_L) :]
        weight = torch.from_numpy(row.weight_L)
        expected.append(nll[weight > 0].detach())
        total = total + (nll * weight).sum() / 3.0
    total.backward()
    nll_N = loss.nll_N[: batch.num_targets]
    torch.testing.assert_close(nll_N, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.total, total, rtol=1e-5, atol=0)
    gradients = dict(own.named_parameters())
    for name, parameter in model.named_parameters():
        distance = (parameter.grad - gradients[name].grad).norm()
        assert distance <= 1e-5 * gradients[name].grad.norm(), name


def test_a_parent_is_the_nearest_one_before():
    """The same prompt twice in a row, as an epoch that draws it twice may have it."""
    prompt, answer = examples()[:2]
    batch = collate([prompt, answer, prompt, answer])
    assert batch.parent_S == [-1, 0, -1, 2]
    assert batch.num_tokens == 2 * (9 + 4)


@pytest.mark.parametrize("kernel", [kernels.varlen, kernels.flash_attention])
def test_kernels_of_a_whole_row_refuse_it(kernel):
    bounds_S = torch.tensor([0, 3, 5], dtype=torch.int32)
    args = kernels.AttentionArgs(0.5, 0.0, None, None, [0, 3, 5], bounds_S, 3, parent_S=[-1, 0])
    x = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ModelError, match="cannot share a prompt between its answers"):
        kernel(x, x, x, args)
