"""A sample inside a pack has the loss that it has by itself, on every supported architecture."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Example
from posttrain_dist.models import Attention, ModelConfig
from posttrain_dist.models.attention import (
    EAGER,
    FLASH,
    SDPA,
    VARLEN,
    implementation,
    register,
)
from posttrain_dist.models.head import Head, HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.models.varlen import AttentionRequirements
from posttrain_dist.objectives.base import TokenCount
from posttrain_dist.objectives.sft import Sft

# Caps so low that forgetting one changes the loss in its first digits.
CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
ARCHITECTURES = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 6},
    "Gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, **CAPS},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory, builders):
    name = request.param
    target = tmp_path_factory.mktemp(name)
    return builders.model(target, architecture=name, **ARCHITECTURES[name])


def examples(vocabulary: int) -> list[Example]:
    draw = np.random.default_rng(0)
    lengths = [5, 17, 2, 11]
    return [
        Example(
            input_ids_L=draw.integers(5, vocabulary, n).astype(np.int32),
            weight_L=((draw.random(n) < 0.6) | (np.arange(n) == 1)).astype(np.float32)
            * (np.arange(n) > 0),
            channel=i % 2,
            sample_id=i,
        )
        for i, n in enumerate(lengths)
    ]


def policy_of(folder, attention=Attention.auto) -> Policy:
    config = ModelConfig(path=str(folder), attention=attention)
    model = load_model(config, folder, dtype=torch.float32, seed=0, materialise=nullcontext())
    return Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), num_channels=2)


def test_a_sample_in_a_pack_has_the_loss_it_has_alone(folder):
    import transformers

    policy = policy_of(folder)
    rows = examples(policy.config.vocab_size)
    batch = collate(rows)
    packed = policy(batch, Sft(), TokenCount(1.0)).nll_N[: batch.num_targets]
    # The independent reference: transformers' own eager attention on one unpacked row.
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids_L.astype(np.int64))
        logits = own(input_ids=ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        expected.append(nll[torch.from_numpy(row.weight_L[1:]) > 0])
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_changing_one_sample_leaves_the_others_alone(folder):
    policy = policy_of(folder)
    rows = examples(policy.config.vocab_size)
    before = policy(collate(rows), Sft(), TokenCount(1.0)).nll_N
    changed = Example(rows[0].input_ids_L + 1, rows[0].weight_L, channel=0, sample_id=0)
    after = policy(collate([changed, *rows[1:]]), Sft(), TokenCount(1.0)).nll_N
    first = int(rows[0].weight_L.sum())
    assert torch.equal(before[first:], after[first:])
    assert not torch.equal(before[:first], after[:first])


def test_head_check_passes_and_notices_a_forgotten_cap(folder):
    policy = policy_of(folder)
    batch = collate(examples(policy.config.vocab_size))
    assert policy.check_head(batch) < 1e-4
    blind = policy_of(folder)
    if blind.config.model_type == "gemma2":
        kernels = HeadKernels(linear_cross_entropy, linear_logprob)
        shape = replace(blind.shape, softcap=None)
        blind.head = Head(blind.head.module, shape, kernels, num_channels=2)
        with pytest.raises(ModelError, match="differs from the logits of Gemma2ForCausalLM"):
            blind.check_head(batch)


# ------------------------------------------------------------------- which implementation


def needs(**changes) -> AttentionRequirements:
    return AttentionRequirements(
        **{"head_dim": 64, "dtype": torch.bfloat16, "device": "cuda", **changes}
    )


@pytest.fixture
def hopper(monkeypatch):
    """A device and packages as a machine with a GPU has them; only the choice is looked at."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.fixture
def flash_attn(monkeypatch):
    find = importlib.util.find_spec
    known = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: known if name == "flash_attn" else find(name)
    )


def test_half_precision_on_a_gpu_takes_one_kernel_a_row(hopper, caplog):
    with caplog.at_level(logging.INFO, logger="posttrain_dist"):
        assert implementation(Attention.auto, needs()) == VARLEN
    assert caplog.messages == ["attention: varlen, one kernel for the whole row"]
    assert implementation(Attention.varlen, needs()) == VARLEN


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "no kernel for packed rows on cpu"),
        ({"dtype": torch.float32}, "do not compute in torch.float32"),
        ({"head_dim": 288}, "heads of 288 are wider than 256"),
        ({"value_head_dim": 32}, "values of 32 stand beside keys of another width"),
        ({"dropout": 0.1}, "drops attention weights out"),
    ],
)
def test_elsewhere_each_sample_by_itself_and_the_log_says_why(hopper, caplog, changes, reason):
    with caplog.at_level(logging.INFO, logger="posttrain_dist"):
        assert implementation(Attention.auto, needs(**changes)) == SDPA
    assert "sdpa, sample by sample" in caplog.text and reason in caplog.text
    with pytest.raises(ModelError, match=reason):
        implementation(Attention.varlen, needs(**changes))


def test_an_old_device_and_an_old_torch_have_no_kernel(hopper, monkeypatch):
    from posttrain_dist.models import varlen as module

    monkeypatch.setattr(module, "_varlen_parameters", lambda: frozenset({"is_causal"}))
    assert implementation(Attention.auto, needs()) == SDPA
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert implementation(Attention.auto, needs()) == SDPA


def test_flash_attn_serves_what_torch_cannot(hopper, flash_attn):
    assert implementation(Attention.auto, needs(softcap=50.0)) == FLASH
    assert implementation(Attention.auto, needs(dropout=0.1)) == FLASH
    assert implementation(Attention.auto, needs()) == VARLEN
    assert implementation(Attention.auto, needs(softcap=50.0, dtype=torch.float32)) == EAGER


def test_the_parameters_of_torch_are_those_that_are_used():
    from posttrain_dist.models.varlen import _varlen_parameters

    assert _varlen_parameters() >= {"scale", "window_size", "enable_gqa"}


def test_sdpa_is_refused_where_attention_is_capped():
    with pytest.raises(ModelError, match=r"caps its attention logits at 50.0"):
        implementation(Attention.sdpa, needs(softcap=50.0))
    assert implementation(Attention.auto, needs(softcap=50.0, device="cpu")) == EAGER


# ----------------------------------------------------------------------- one layer's attention


def reference(q, k, v, bounds, window, softcap=None):
    """Attention with a [T, T] mask, written out; heads first, float64."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    sample_T = torch.repeat_interleave(torch.tensor([e - s for s, e in pairwise(bounds)]))
    place_T = torch.arange(bounds[-1])
    distance_TT = place_T[:, None] - place_T
    seen_TT = (distance_TT >= 0) & (distance_TT < (window or bounds[-1]))
    seen_TT &= sample_T[:, None] == sample_T
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.3
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~seen_TT.to(q.device), float("-inf"))
    return torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v)


def heads(num_heads, num_shared, device="cpu", dtype=torch.float64):
    """Bounds of a row, and its q, k, v as a decoder layer lays them out."""
    bounds = [0, 40, 41, 48, 78]
    torch.manual_seed(0)
    laid = [torch.randn(1, bounds[-1], n, 16) for n in (num_heads, num_shared, num_shared)]
    return bounds, [x.to(device, dtype).transpose(1, 2).requires_grad_() for x in laid]


def attend(name, bounds, qkv, **options):
    register()
    output, _ = ALL_ATTENTION_FUNCTIONS[name](
        torch.nn.Module(),
        *qkv,
        None,
        scaling=0.3,
        cu_seqlens=bounds,
        bounds_S=torch.tensor(bounds, dtype=torch.int32, device=qkv[0].device),
        max_seqlen=40,
        **options,
    )
    return output


@pytest.mark.parametrize("name", [SDPA, EAGER])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("num_shared", [1, 2, 4])
def test_shared_heads_and_windows_against_one_masked_matrix(name, window, num_shared):
    bounds, qkv = heads(4, num_shared)
    expected = reference(*qkv, bounds, window)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), qkv)
    output = attend(name, bounds, qkv, sliding_window=window)
    assert output.is_contiguous() and output.shape == (1, 78, 4, 16)
    close = {"rtol": 1e-5, "atol": 1e-6}  # eager takes its softmax in float32
    torch.testing.assert_close(output, expected, **close)
    found = torch.autograd.grad((output * weight).sum(), qkv)
    for gradient, own in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, own, **close)


@pytest.mark.parametrize("window", [None, 5])
def test_what_the_kernel_of_a_row_is_asked_for(monkeypatch, window):
    """Its documented contract in plain torch: [T, H, d] in and out, bounds, inclusive window."""

    def documented(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert (cu_q.dtype, max_q, max_k, enable_gqa) == (torch.int32, 40, 40, True)
        before, after = window_size
        outputs = []
        for start, end in pairwise(cu_q.tolist()):
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
            seen = (distance >= -after) & ((distance <= before) | (before == -1))
            shared = (x[start:end].repeat_interleave(2, dim=1) for x in (k, v))
            key, value = (x.transpose(0, 1) for x in shared)
            scores = q[start:end].transpose(0, 1) @ key.transpose(1, 2) * scale
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outputs.append((weights @ value).transpose(0, 1))
        assert cu_q.equal(cu_k)
        return torch.cat(outputs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    monkeypatch.setattr(
        "posttrain_dist.models.varlen._varlen_parameters", lambda: frozenset({"enable_gqa"})
    )
    bounds, qkv = heads(4, 2)
    expected = reference(*qkv, bounds, window)
    torch.testing.assert_close(attend(VARLEN, bounds, qkv, sliding_window=window), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [VARLEN, FLASH])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("num_shared", [2, 4])
def test_kernels_of_a_row_equal_sample_by_sample(name, window, num_shared):
    from posttrain_dist.models.varlen import flash_missing, varlen_missing

    missing = {VARLEN: varlen_missing, FLASH: flash_missing}[name](needs(head_dim=16))
    if missing:
        pytest.skip(missing)
    bounds, qkv = heads(4, num_shared, "cuda", torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = reference(*exact, bounds, window)
    weight = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad((expected * weight).sum(), exact)]

    def results(implementation):
        output = attend(implementation, bounds, qkv, sliding_window=window)
        return [output, *torch.autograd.grad((output * weight.bfloat16()).sum(), qkv)]

    for found, beside, truth in zip(results(name), results(SDPA), wanted, strict=True):
        # No further from the truth than torch's own attention in the same precision.
        error, usual = ((x.double() - truth).norm() / truth.norm() for x in (found, beside))
        assert error <= 1.5 * usual + 1e-3, (error, usual)
