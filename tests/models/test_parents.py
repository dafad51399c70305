"""Samples that follow another have the loss, and give the gradients, that they have behind it."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from forests import FORESTS, alone, chain, check_equal, examples
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.models import Attention, Checkpointing, ModelConfig
from posttrain_dist.models.attention import VARLEN
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.lora import Lora

# Windows so short that a child's queries do not see all of its parent.
CASES = {
    "Llama": (Attention.sdpa, {}),
    "Llama eager": (Attention.eager, {}),
    "Qwen3": (Attention.sdpa, {}),
    "Mistral": (Attention.sdpa, {"sliding_window": 6}),
    "Gemma2": (
        Attention.eager,
        {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, builders):
    """Model folders by case, each made once."""
    made = {}

    def folder(case):
        if case not in made:
            target = tmp_path_factory.mktemp("model")
            name, changes = case.partition(" ")[0], CASES[case][1]
            made[case] = builders.model(target, architecture=name, **changes)
        return made[case]

    return folder


def policy_of(folder, attention, tuning=None, **options) -> Policy:
    model = load_model(
        ModelConfig(path=str(folder), attention=attention, **options),
        folder,
        dtype=torch.float32,
        seed=0,
        materialise=nullcontext(),
        attach=(lambda model: None) if tuning is None else tuning.attach,
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if tuning is not None and tuning.trained(name):
                parameter.normal_(std=0.2, generator=draw)
    kernels = HeadKernels(linear_cross_entropy, linear_logprob)
    return Policy(model, kernels, num_channels=2, tuning=tuning).train()


@pytest.mark.parametrize("kind", FORESTS)
@pytest.mark.parametrize("case", CASES)
def test_a_tree_equals_each_of_its_paths_alone(folders, case, kind):
    check_equal(policy_of(folders(case), CASES[case][0]), examples(kind))


def test_recomputed_trees_are_the_same(folders):
    recompute = Checkpointing.full
    policy = policy_of(folders("Mistral"), Attention.sdpa, activation_checkpointing=recompute)
    check_equal(policy, examples("tree"), together=True)


def test_trees_under_lora_are_the_same(folders):
    policy = policy_of(folders("Llama"), Attention.sdpa, Lora(rank=4, alpha=8))
    check_equal(policy, examples("group"))


def test_channels_have_the_sums_of_their_samples_alone(folders):
    policy = policy_of(folders("Llama"), Attention.sdpa)
    rows = examples("pairs")
    tables = [
        sum(policy(collate(each), TokenLoss(), TokenCount(3.0)).channels_CK for each in batches)
        for batches in ([rows], [[row] for row in alone(rows)])
    ]
    torch.testing.assert_close(*tables, rtol=1e-6, atol=0)
    assert tables[0].any(dim=1).all(), "both channels have targets"


@pytest.mark.parametrize("case", ["Llama", "Gemma2"])
def test_losses_and_gradients_are_those_of_transformers(folders, case):
    import transformers

    rows = examples("tree")
    batch = collate(rows)
    assert batch.parent_S == [-1, 0, 0, 2, 2, 4, 4, -1]
    assert batch.position_ids_T[batch.cu_seqlens_S[:-1]].tolist() == [0, 14, 14, 23, 23, 31, 31, 0]
    policy = policy_of(folders(case), CASES[case][0])
    loss = policy(batch, TokenLoss(), TokenCount(3.0))
    loss.total.backward()

    own = transformers.AutoModelForCausalLM.from_pretrained(
        folders(case), attn_implementation="eager"
    )
    expected, total = [], torch.zeros(())
    for row in rows:
        ids = np.concatenate([each.input_ids_L for each in chain(rows, row.sample_id)])
        ids = torch.from_numpy(ids).long()
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
    for name, parameter in policy.causal_lm.named_parameters():
        distance = (parameter.grad - gradients[name].grad).norm()
        assert distance <= 1e-5 * gradients[name].grad.norm(), name


def test_a_parent_is_the_nearest_one_before():
    """The same prompt twice in a row, as an epoch that draws it twice may have it."""
    prompt, answer = examples("pairs")[:2]
    batch = collate([prompt, answer, prompt, answer])
    assert batch.parent_S == [-1, 0, -1, 2]
    assert batch.num_tokens == 2 * (17 + 5)


# ------------------------------------------------------------------------ kernels of a whole row


def documented(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    """What the kernel promises, by torch: causal mask and window aligned to the last key."""
    assert max_q == max(e - s for s, e in pairwise(cu_q.tolist()))
    assert max_k == max(e - s for s, e in pairwise(cu_k.tolist()))
    outputs = []
    for (start, end), (first, last) in zip(
        pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True
    ):
        behind = torch.arange(end - start)[:, None] + last - first - (end - start)
        seen = torch.arange(last - first) <= behind
        if window_size[0] >= 0:
            seen &= torch.arange(last - first) >= behind - window_size[0]
        own = (x.transpose(0, 1)[None] for x in (q[start:end], k[first:last], v[first:last]))
        output = torch.nn.functional.scaled_dot_product_attention(
            *own, attn_mask=seen, scale=scale, enable_gqa=True
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("case", ["Llama", "Mistral"])
def test_a_kernel_of_a_whole_row_gets_the_keys_of_every_path(folders, monkeypatch, case):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    monkeypatch.setattr("posttrain_dist.models.varlen._varlen_parameters", frozenset)
    policy = policy_of(folders(case), Attention.sdpa)
    policy.causal_lm.set_attn_implementation(VARLEN)
    check_equal(policy, examples("tree"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ["Llama", "Mistral"])
@pytest.mark.parametrize("kind", FORESTS)
def test_trees_on_a_gpu_are_as_near_to_the_truth_as_their_paths_alone(folders, case, kind):
    from posttrain_dist.models.varlen import AttentionRequirements, varlen_missing

    if missing := varlen_missing(AttentionRequirements(head_dim=64, dtype=torch.bfloat16)):
        pytest.skip(missing)
    rows = examples(kind)
    exact = policy_of(folders(case), Attention.eager).double()
    wanted = flat_gradient(exact, alone(rows), "cpu")
    half = policy_of(folders(case), Attention.eager).bfloat16().cuda()
    half.causal_lm.set_attn_implementation(VARLEN)
    shared, usual = (
        float((flat_gradient(half, each, "cuda") - wanted).norm()) for each in (rows, alone(rows))
    )
    assert shared <= 1.5 * usual + 1e-3 * float(wanted.norm())


def flat_gradient(policy, rows, device) -> torch.Tensor:
    policy.zero_grad()
    batch = collate(rows).to(device)
    policy(batch, TokenLoss(), TokenCount(7.0)).total.backward()
    gradients = [p.grad.double().flatten().cpu() for p in policy.causal_lm.parameters()]
    return torch.cat(gradients)
