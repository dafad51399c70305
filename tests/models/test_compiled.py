"""model.compile: the same losses and gradients, and no row that compiles again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from posttrain_kernels import linear_cross_entropy, linear_logprob
from torch._dynamo.utils import counters

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ConfigError
from posttrain_dist.flow import Example
from posttrain_dist.models.attention import SDPA, register
from posttrain_dist.models.compiled import compile_layers
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount
from posttrain_dist.objectives.sft import Sft

LAYERS = 12  # more than the programs that dynamo keeps for one function


def policy() -> Policy:
    register()
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=SDPA
    )
    return Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), num_channels=1)


def batch(*lengths: int):
    draw = np.random.default_rng(0)
    return collate(
        [
            Example(draw.integers(5, 60, n).astype(np.int32), np.ones(n, np.float32), 0, i)
            for i, n in enumerate(lengths)
        ]
    )


def step(model: Policy, row) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(row, Sft(), TokenCount(10.0))
    loss.total.backward()
    return loss.nll_N, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_losses_and_gradients_stay_and_nothing_is_compiled_again():
    # Dynamo guards the sizes, whatever the backend makes of the graphs; this one needs no g++.
    torch.compiler.reset()
    counters.clear()
    plain, compiled = policy(), policy()
    compile_layers(compiled.causal_lm, backend="aot_eager")
    rows = [batch(20, 15), batch(7), batch(90, 60, 3), batch(40, 40, 100, 150)]  # N: 128 to 384
    for row in rows:
        nll_N, gradients = step(plain, row)
        compiled_nll_N, compiled_gradients = step(compiled, row)
        torch.testing.assert_close(compiled_nll_N, nll_N, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            assert gradient.abs().sum() > 0, name
            torch.testing.assert_close(
                compiled_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name
            )
    assert counters["stats"]["unique_graphs"] == 2  # a norm and an MLP, for all layers and rows


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"model.compile.*there is no no-such-compiler"):
        compile_layers(policy().causal_lm)
