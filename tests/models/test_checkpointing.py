"""Activation checkpointing: the same gradients, from fewer saved activations."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ConfigError
from posttrain_dist.flow import Example
from posttrain_dist.models import Checkpointing, ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.layers import decoder_layers
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount
from posttrain_dist.objectives.sft import Sft

LAYERS = 4
none, full, selective = Checkpointing
WISHES = [(none, None), (selective, 1), (selective, 3), (full, None)]


@pytest.fixture(scope="module", params=["Llama", "Gemma2", "Phi"])
def folder(request, tmp_path_factory, builders):
    target = tmp_path_factory.mktemp(request.param)
    return builders.model(target, request.param, num_hidden_layers=LAYERS)


def policy_of(folder, wish=none, number=None, offload=False) -> Policy:
    config = ModelConfig(path=str(folder), activation_checkpointing=wish, checkpoint_layers=number)
    config.checkpoint_offload = offload
    model = load_model(config, folder, dtype=torch.float32, seed=0, materialise=nullcontext())
    return Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), num_channels=1).train()


def batch():
    draw = np.random.default_rng(0)
    rows = [
        Example(draw.integers(5, 200, n).astype(np.int32), np.ones(n, np.float32), 0, i)
        for i, n in enumerate([70, 90])
    ]
    return collate(rows)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that the forward keeps for backward, each storage once, parameters left out."""

    def __init__(self, policy):
        self.known = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        self.num_bytes, self.kept = 0, []
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.kept.append(tensor)  # so that no address is used twice
            self.num_bytes += storage.nbytes()
        return tensor


def measured(folder, wish, number):
    """(gradients, calls of each layer's MLP, bytes kept by the forward) of one step."""
    policy = policy_of(folder, wish, number)
    calls = [0] * LAYERS
    for i, layer in enumerate(decoder_layers(policy.causal_lm)):
        # Before the call: the second one ends as soon as backward has what it needs.
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    saved = Saved(policy)
    with saved:
        total = policy(batch(), Sft(), TokenCount(10.0)).total
    total.backward()
    return {n: p.grad for n, p in policy.named_parameters()}, calls, saved.num_bytes


def test_gradients_stay_layers_run_again_and_less_is_kept(folder):
    expected, calls, most_bytes = measured(folder, none, None)
    assert calls == [1] * LAYERS
    kept_bytes = [most_bytes]
    for wish, number in WISHES[1:]:
        gradients, calls, num_bytes = measured(folder, wish, number)
        again = LAYERS if number is None else number
        assert calls == [2] * again + [1] * (LAYERS - again)
        for name, gradient in gradients.items():
            assert gradient.abs().sum() > 0, name
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=0, msg=name)
        kept_bytes.append(num_bytes)
    # The first layers cost alike, each at least the 160 rows of 32 floats of its input and more.
    one, three = (most_bytes - kept_bytes[i] for i in (1, 2))
    assert one > 10 * 160 * 32 * 4
    assert three == pytest.approx(3 * one, rel=0.02)
    assert kept_bytes[3] < kept_bytes[2]


def test_what_waits_in_host_memory_is_the_input_of_each_layer(folder, monkeypatch):
    """A copy there, and another one back, as between a GPU and its host."""
    expected, *_ = measured(folder, none, None)
    away = []

    class Away(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            assert pin_memory == torch.cuda.is_available()
            super().__init__(self.pack, lambda place: away[place].clone())

        def pack(self, tensor):
            away.append(tensor.detach().clone())
            return len(away) - 1

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Away)
    policy = policy_of(folder, full, offload=True)
    total = policy(batch(), Sft(), TokenCount(10.0)).total
    rows = [tuple(tensor.shape) for tensor in away if tensor.is_floating_point()]
    assert [shape for shape in rows if len(shape) == 3] == [(1, 160, 32)] * LAYERS
    total.backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=0, msg=name)


def test_evaluation_recomputes_nothing(folder):
    policy = policy_of(folder, full).eval()
    calls = []
    decoder_layers(policy.causal_lm)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    policy(batch(), Sft(), TokenCount(10.0)).total.backward()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("wish", "number", "problem"),
    [
        (full, 2, "is 2, but model.activation_checkpointing is full"),
        (none, 2, "is 2, but model.activation_checkpointing is none"),
        (selective, None, "is None, and the model has 4 layers"),
        (selective, 5, "is 5, and the model has 4 layers"),
        (selective, 0, "is 0, and the model has 4 layers"),
    ],
)
def test_a_number_that_does_not_fit_is_refused(tmp_path, builders, wish, number, problem):
    folder = builders.model(tmp_path / "model", num_hidden_layers=LAYERS)
    with pytest.raises(ConfigError, match=f"model.checkpoint_layers.*{problem}"):
        policy_of(folder, wish, number)
