"""Every line of the table of architectures: what is trained is exact, what is refused has to be."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from forests import chain
from posttrain_kernels import linear_cross_entropy, linear_logprob
from small_configs import VARIANTS, small_config

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.flow import Batch, Example
from posttrain_dist.models.architectures.known import REFUSED, TRAINED, Reason
from posttrain_dist.models.attention import EAGER, SDPA, register
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.layers import decoder_layers
from posttrain_dist.models.policy import Policy
from posttrain_dist.models.shape import ModelShape
from posttrain_dist.objectives.base import TokenCount
from posttrain_dist.objectives.sft import Sft

KERNELS = HeadKernels(linear_cross_entropy, linear_logprob)
# By default: what each of our own measures for an architecture is there for.
SAMPLE = {"gpt2", "gpt_bigcode", "stablelm", "nemotron", "minicpm3", "hyperclovax", "gemma4_text"}
REFUSED_SAMPLE = {"gptj", "bloom", "lfm2", "modernbert-decoder", "granite_swa", "bert", "mixtral"}


def sampled(model_types: Any, sample: set[str]) -> list[Any]:
    assert sample <= set(model_types)
    slow = [pytest.mark.slow]
    return [pytest.param(t, marks=() if t in sample else slow) for t in sorted(model_types)]


def samples() -> list[Example]:
    """Four that stand alone, and two that follow the second of them."""
    draw = np.random.default_rng(0)
    found = []
    for i, (n, parent) in enumerate([*((n, None) for n in (5, 17, 2, 11)), (6, 1), (4, 1)]):
        weight_L = ((draw.random(n) < 0.6) | (np.arange(n) == 1)) * (np.arange(n) > 0)
        weight_L = weight_L | ((np.arange(n) == 0) & (parent is not None))
        ids_L = draw.integers(5, 200, n).astype(np.int32)
        found.append(Example(ids_L, weight_L.astype(np.float32), i % 2, i, parent=parent))
    return found


def build(config: Any, attention: str) -> torch.nn.Module:
    """A random model, the same at every call, with no norm without effect."""
    import transformers

    register()
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.5))
    return model.eval()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


def alone(config: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of the targets, and gradients of their sum / 7: transformers alone, row by row."""
    own = build(config, "eager")
    losses = []
    for sample in samples():
        path = [each.input_ids_L for each in chain(samples(), sample.sample_id)]
        ids_L = torch.from_numpy(np.concatenate(path).astype(np.int64))
        logits_LV = own(input_ids=ids_L[None], use_cache=False).logits[0, :-1]
        nll_L = torch.nn.functional.cross_entropy(logits_LV, ids_L[1:], reduction="none")
        is_target_L = torch.from_numpy(sample.weight_L) > 0
        losses.append(nll_L[-len(is_target_L) :][is_target_L[-len(nll_L) :]])
    nll_N = torch.cat(losses)
    (nll_N.sum() / 7).backward()
    return nll_N.detach(), gradients(own)


def packed(
    config: Any, batch: Batch, checkpointing: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same of a packed row, as a training computes them."""
    shape = ModelShape.of(config.to_dict())
    policy = Policy(build(config, EAGER if shape.attention_softcap else SDPA), KERNELS, 2)
    policy.check_head(batch)
    policy.train(checkpointing)
    for layer in decoder_layers(policy.causal_lm):
        layer.gradient_checkpointing = checkpointing
        layer._gradient_checkpointing_func = lambda run, *args: torch.utils.checkpoint.checkpoint(
            run, *args, use_reentrant=False
        )
    loss = policy(batch, Sft(), TokenCount(7.0))
    loss.total.backward()
    return loss.nll_N[: batch.num_targets].detach(), gradients(policy.causal_lm)


def assert_exact(config: Any, checkpointing: bool = False) -> None:
    expected_N, expected = alone(config)
    found_N, found = packed(config, collate(samples()), checkpointing)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    assert sum(bool(gradient.any()) for gradient in found.values()) > len(found) / 2
    for name, gradient in found.items():
        # The bias of keys has no gradient but for rounding.
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize("model_type", sampled(TRAINED, SAMPLE))
def test_a_packed_row_has_the_losses_and_gradients_of_its_samples_alone(model_type):
    assert_exact(small_config(model_type))


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_so_have_other_forms_of_an_architecture(model_type, changes):
    assert_exact(small_config(model_type, changes))


DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@pytest.mark.parametrize("model_type", ["gpt2", "stablelm"])
def test_so_have_layers_that_compute_their_activations_again(model_type):
    config = small_config(model_type)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    assert_exact(config, checkpointing=True)


def test_a_backbone_that_keeps_all_rows_runs_its_last_mlp_on_the_supervised_ones():
    policy = Policy(build(small_config("gpt2"), SDPA), KERNELS, 2)
    batch, seen = collate(samples()), {}
    for name in ("h.0.mlp.c_fc", "h.1.mlp.c_fc", "ln_f"):
        module = policy.causal_lm.transformer.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0].shape}))
    hidden_ND = policy.hidden(batch)
    num_rows = len(batch.supervised_N)
    assert num_rows != len(batch.input_ids_T) == 45
    assert seen["h.1.mlp.c_fc"] == (1, num_rows, 32) and seen["h.0.mlp.c_fc"] == (1, 45, 32)
    assert seen["ln_f"] == (1, 45, 32) and hidden_ND.shape == (num_rows, 32)


# ------------------------------------------------------------------------------- what is refused


def is_exact(config: Any) -> bool:
    """Whether a refused architecture would be right all the same; it may also die."""
    expected_N, _ = alone(config)
    try:
        found_N, _ = packed(config, collate(samples()))
    except Exception:
        return False
    return bool((found_N - expected_N).abs().max() < 1e-3)


def looks_ahead(config: Any) -> bool:
    """Whether a token's logits depend on those after it."""
    own = build(config, "eager")
    ids_T = torch.from_numpy(samples()[1].input_ids_L.astype(np.int64))
    changed_T = ids_T.clone()
    changed_T[-1] += 1
    before, after = (own(input_ids=ids[None]).logits[0, 0] for ids in (ids_T, changed_T))
    return bool((before - after).abs().max() > 1e-3)


def has_experts(config: Any) -> bool:
    with torch.device("meta"):
        import transformers

        model = transformers.AutoModelForCausalLM.from_config(config)
    names = {type(module).__name__.lower() for module in model.modules()}
    return any("moe" in name or "expert" in name for name in names)


@pytest.mark.parametrize("model_type", sampled(REFUSED, REFUSED_SAMPLE))
def test_what_is_refused_has_to_be(model_type):
    reason, config = REFUSED[model_type], small_config(model_type)
    if reason is Reason.experts:
        assert has_experts(config)
    elif reason is Reason.bidirectional:
        assert looks_ahead(config)
    elif reason is Reason.seq2seq:
        assert config.is_encoder_decoder
    else:
        assert not is_exact(config)
