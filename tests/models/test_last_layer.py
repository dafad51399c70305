"""Only supervised rows leave the last layer, and nothing else changes."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Example
from posttrain_dist.models import last_layer
from posttrain_dist.models.attention import EAGER, SDPA, register
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.layers import decoder_layers
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount
from posttrain_dist.objectives.sft import Sft

KERNELS = HeadKernels(linear_cross_entropy, linear_logprob)

# Caps and multipliers so far from 1 that forgetting one changes the loss in its first digits.
CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
GEMMA = {"sliding_window": 6, "query_pre_attn_scalar": 8}
MULTIPLIERS = {"attention_multiplier": 0.5, "residual_multiplier": 0.3, "logits_scaling": 2.0}
ARCHITECTURES = {
    "Llama": {"attention_bias": True},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3": {},
    "Mistral": {"sliding_window": 6},
    "Granite": MULTIPLIERS,
    "Gemma2": {**GEMMA, **CAPS},
    "Gemma3": GEMMA,
    "Phi": {},  # attention and MLP side by side
}
SIZE = {
    "vocab_size": 220,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 1,
}
TOKENS = 35


def causal_lm(name: str, attention: str):
    """A random model, the same at every call."""
    import transformers

    register()
    kind = {"Gemma3": "Gemma3Text"}.get(name, name)
    config = getattr(transformers, f"{kind}Config")(**SIZE, **ARCHITECTURES[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation=attention
    )
    with torch.no_grad():  # far from zero, and no norm without effect
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.5))
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request):
    attention = EAGER if "attn_logit_softcapping" in ARCHITECTURES[request.param] else SDPA
    return Policy(causal_lm(request.param, attention), KERNELS, num_channels=2)


def batch_of(masked: float, vocabulary: int = 200):
    """Four samples of which a share of the tokens is no target; 1.0 leaves one target."""
    draw = np.random.default_rng(1)
    rows = []
    for i, length in enumerate([5, 17, 2, 11]):
        weight_L = (draw.random(length) >= masked) * draw.uniform(0.5, 2.0, length)
        if masked == 1.0 and i == 1:
            weight_L[7] = 1.0
        ids_L = draw.integers(5, vocabulary, length).astype(np.int32)
        rows.append(Example(ids_L, weight_L.astype(np.float32), channel=i % 2, sample_id=i))
    return collate(rows)


def whole_row(batch) -> dict:
    """What a model without any change takes: all rows, and the attention's bounds."""
    return {
        "input_ids": batch.input_ids_T[None],
        "position_ids": batch.position_ids_T[None],
        "cu_seqlens": batch.cu_seqlens_S,
        "use_cache": False,
    }


def gradients(policy) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in policy.named_parameters()}
    policy.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("masked", [0.0, 0.7, 1.0])
def test_losses_and_gradients_are_those_of_the_whole_row(policy, masked, checkpointing):
    batch = batch_of(masked)
    assert len(batch.supervised_N) == 128 > batch.num_targets  # padding is there

    logits_NV = policy.causal_lm(**whole_row(batch)).logits[0][batch.supervised_N]
    nll_N = torch.nn.functional.cross_entropy(logits_NV, batch.labels_N, reduction="none")
    total = (nll_N * batch.weight_N).sum() / 7.0
    total.backward()
    expected = gradients(policy)

    policy.train(checkpointing)
    for layer in decoder_layers(policy.causal_lm):
        layer.gradient_checkpointing = checkpointing
        layer._gradient_checkpointing_func = lambda run, *args: torch.utils.checkpoint.checkpoint(
            run, *args, use_reentrant=False
        )
    loss = policy(batch, Sft(), TokenCount(7.0))
    loss.total.backward()

    # The head gives its figures in float32.
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.nll_N.double(), nll_N, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients(policy).items():
        assert expected[name].abs().sum() > 0, name
        # Norms compute in float32, whatever the weights are in.
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def test_the_mlp_computes_the_supervised_rows_only(policy):
    batch = batch_of(0.7)
    last = decoder_layers(policy.causal_lm)[-1]
    seen: dict[str, int] = {}

    def watch(name):
        def hook(module, args, kwargs, output):
            seen[name] = (args or tuple(kwargs.values()))[0].shape[1]

        return hook

    hooks = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in last.named_modules()
    ]
    policy.hidden(batch)
    for hook in hooks:
        hook.remove()
    inside_mlp = {name for name in seen if name.split(".")[0] == "mlp"}
    assert len(inside_mlp) >= 4
    assert {seen[name] for name in inside_mlp} == {128}
    whole = {name for name in seen if name.endswith(("_proj", "layernorm"))} - inside_mlp
    assert len(whole) >= 4
    assert {seen[name] for name in whole} == {seen[""]} == {TOKENS}  # "": the layer, its hooks fire
    assert not last.mlp._forward_hooks


def test_a_model_without_rows_is_as_it_was(policy, request):
    ids = batch_of(0.0).input_ids_T[None, 5:22]
    own = causal_lm(request.node.callspec.params["policy"], "eager")
    expected = own(input_ids=ids).logits
    logits = policy.causal_lm(input_ids=ids, cu_seqlens=[0, 17], use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # norms are in float32


def test_the_start_up_check_notices_an_mlp_that_mixes_rows(monkeypatch):
    model = causal_lm("Llama", SDPA)
    batch = batch_of(0.7)
    assert Policy(model, KERNELS, num_channels=2).check_head(batch) < 1e-4
    mlp = decoder_layers(model)[-1].mlp
    own = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda hidden_1TD: own(hidden_1TD.cumsum(dim=1)))
    wrong = Policy(causal_lm("Llama", SDPA), KERNELS, num_channels=2)
    wrong.causal_lm = model
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*MLP of its last layer mixes rows"):
        wrong.check_head(batch)


class TupleLayer(GradientCheckpointingLayer):
    """A layer and an MLP that return tuples, as some architectures' do."""

    class Double(torch.nn.Module):
        def forward(self, hidden_1TD):
            return 2.0 * hidden_1TD, hidden_1TD.shape[1]

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, self.Double())

    def forward(self, hidden_1TD):
        more_1TD, num_computed = self.get_submodule(self.name)(hidden_1TD)
        return hidden_1TD + more_1TD, num_computed


@pytest.mark.parametrize(("name", "num_computed"), [("mlp", 3), ("feed_forward", 4)])
def test_the_log_names_a_layer_whose_mlp_is_not_found(caplog, name, num_computed):
    layer = TupleLayer(name)
    with caplog.at_level(logging.WARNING, logger="posttrain_dist"):
        last_layer.select_supervised_rows(torch.nn.Sequential(TupleLayer("mlp"), layer))
    warned = ["the last layer runs on all rows: a TupleLayer has no `mlp`"]
    assert [record.getMessage() for record in caplog.records] == (warned if name != "mlp" else [])
    hidden_1TD = torch.arange(8.0).reshape(1, 4, 2)
    output_1ND, computed = layer(hidden_1TD, supervised_N=torch.tensor([3, 0, 0]))
    assert output_1ND.tolist() == [[[18.0, 21.0], [0.0, 3.0], [0.0, 3.0]]]
    assert computed == num_computed
