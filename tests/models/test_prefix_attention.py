"""Attention with trained keys and values before each sample, against one masked matrix."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Batch, Example
from posttrain_dist.models.attention import EAGER, FLASH, SDPA, VARLEN, register
from posttrain_dist.models.varlen import RowPrefix

NUM, LAYER, LENGTHS = 3, 1, (9, 1, 6)


def batch(parents=(None, None, None)) -> Batch:
    rows = [
        Example(np.zeros(n, np.int32), np.ones(n, np.float32), 0, i, parent=parent)
        for i, (n, parent) in enumerate(zip(LENGTHS, parents, strict=True))
    ]
    return collate(rows)


def tensors(num_shared=2):
    """q, k, v [1, H, T, d] and the prefixes of two layers, float64 but for the prefixes."""
    torch.manual_seed(0)
    heads = (4, num_shared, num_shared)
    qkv = [torch.randn(1, n, sum(LENGTHS), 16).double().requires_grad_() for n in heads]
    kv_L = [torch.randn(2, num_shared, NUM, 16).requires_grad_() for _ in range(2)]
    return qkv, kv_L


def attend(name, row, qkv, kv_L, **options):
    register()
    module = torch.nn.Module()
    module.layer_idx = options.pop("layer_idx", LAYER)
    output, _ = ALL_ATTENTION_FUNCTIONS[name](
        module,
        *qkv,
        None,
        scaling=0.3,
        cu_seqlens=row.cu_seqlens_S,
        bounds_S=row.bounds_S,
        max_seqlen=row.max_seqlen,
        parent_S=row.parent_S,
        prefix=RowPrefix.of(tuple(kv_L), row),
        **options,
    )
    return output


def reference(row, qkv, kv, window=None, softcap=None):
    """Every sample's queries over prefix, parents and itself, by one mask; float64."""
    q, k, v = qkv
    total, (keys, values) = sum(LENGTHS), kv.double()
    k, v = (torch.cat([own[None], x], dim=2) for own, x in ((keys, k), (values, v)))
    k, v = (x.repeat_interleave(4 // x.shape[1], dim=1) for x in (k, v))
    sample_T = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    seen = torch.zeros(total, NUM + total, dtype=torch.bool)
    for t, sample in enumerate(sample_T):
        place = int(row.position_ids_T[t]) + NUM  # in prefix, parents, sample
        near = range(NUM + total) if window is None else range(place - window + 1, place + 1)
        seen[t, [p for p in range(NUM) if p in near]] = True
        line = {sample}
        while (sample := row.parent_S[sample]) >= 0:
            line.add(sample)
        for u in range(t + 1):
            if sample_T[u] in line and int(row.position_ids_T[u]) + NUM in near:
                seen[t, NUM + u] = True
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.3
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bhjd->bihd", weights, v)


def compare(found, expected, inputs):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.manual_seed(1)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for own, other in zip(torch.autograd.grad((found * weight).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [SDPA, EAGER])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("parents", [(None, None, None), (None, 0, 1), (None, None, 0)])
def test_each_root_and_who_follows_it_see_the_prefix(name, window, parents):
    row = batch(parents)
    qkv, kv_L = tensors()
    found = attend(name, row, qkv, kv_L, sliding_window=window)
    compare(found, reference(row, qkv, kv_L[LAYER], window), [*qkv, kv_L[LAYER]])


def test_logits_of_prefixes_are_capped_too():
    qkv, kv_L = tensors(num_shared=4)
    found = attend(EAGER, batch(), qkv, kv_L, softcap=1.5)
    compare(found, reference(batch(), qkv, kv_L[LAYER], softcap=1.5), [*qkv, kv_L[LAYER]])


def documented(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, scale):
    """The contract of the kernels of a row: causal mask and window, aligned bottom right."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == max(e - s for s, e in pairwise(cu_q.tolist()))
    assert max_k == max(e - s for s, e in pairwise(cu_k.tolist()))
    outputs = []
    for (start, end), (first, last) in zip(
        pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True
    ):
        place_q = torch.arange(end - start) + (last - first) - (end - start)
        distance = place_q[:, None] - torch.arange(last - first)
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] == -1))
        key, value = (x[first:last].repeat_interleave(2, dim=1).transpose(0, 1) for x in (k, v))
        scores = q[start:end].transpose(0, 1) @ key.transpose(1, 2) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append((weights @ value).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", [VARLEN, FLASH])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("parents", [(None, None, None), (None, 0, 1), (None, None, 0)])
def test_what_the_kernels_of_a_row_are_asked_for(monkeypatch, name, window, parents):
    """The kernels need a GPU; their documented contract stands for them, in plain torch."""

    def flash(*args, softmax_scale, window_size, causal, dropout_p, softcap):
        assert (causal, dropout_p, softcap) == (True, 0.0, 0.0)
        return documented(*args, scale=softmax_scale, window_size=window_size)

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    monkeypatch.setattr("posttrain_dist.models.varlen._varlen_parameters", frozenset)
    qkv, kv_L = tensors()
    row = batch(parents)
    found = attend(name, row, qkv, kv_L, sliding_window=window)
    compare(found, reference(row, qkv, kv_L[LAYER], window), [*qkv, kv_L[LAYER]])


@pytest.mark.parametrize("name", [SDPA, EAGER, VARLEN])
def test_a_prefix_of_no_keys_is_no_prefix(monkeypatch, name):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    monkeypatch.setattr("posttrain_dist.models.varlen._varlen_parameters", frozenset)
    qkv, kv_L = tensors()
    empty = [kv[:, :, :0] for kv in kv_L]
    register()
    row = batch()
    bounds = (row.cu_seqlens_S, row.bounds_S, row.max_seqlen)
    keywords = dict(zip(("cu_seqlens", "bounds_S", "max_seqlen"), bounds, strict=True))
    plain, _ = ALL_ATTENTION_FUNCTIONS[name](torch.nn.Module(), *qkv, None, scaling=0.3, **keywords)
    assert torch.equal(attend(name, row, qkv, empty), plain)


def test_gradients_of_many_samples_add_up_in_float32():
    """Each of 300 samples adds the same to the prefix; a bfloat16 sum stands still at 256."""
    samples = 300
    lengths = [1] * samples
    rows = [Example(np.zeros(1, np.int32), np.ones(1, np.float32), 0, i) for i in range(samples)]
    row = collate(rows)
    register()
    x = torch.zeros(1, 1, sum(lengths), 8, dtype=torch.bfloat16)
    kv = torch.zeros(2, 1, 1, 8, requires_grad=True)
    module = torch.nn.Module()
    module.layer_idx = 0
    output, _ = ALL_ATTENTION_FUNCTIONS[EAGER](
        module, x, x, x, None, cu_seqlens=row.cu_seqlens_S, prefix=RowPrefix.of((kv,), row)
    )
    output.float().sum().backward()
    assert kv.grad[1].tolist() == [[[samples / 2] * 8]]  # half of the attention, in each


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"layer_idx": None}, "Module does not know its layer"),
        ({"layer_idx": 2}, "Module does not know its layer"),
        ({"num_shared": 1}, r"Module has keys of \(1, 16\) and values of \(1, 16\)"),
    ],
)
def test_a_layer_that_a_prefix_does_not_fit_is_named(changes, part):
    _, kv_L = tensors()
    qkv, _ = tensors(changes.pop("num_shared", 2))
    with pytest.raises(ModelError, match=part):
        attend(SDPA, batch(), qkv, kv_L, **changes)
