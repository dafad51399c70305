"""Every sample of a packed row has its own virtual tokens, as `peft` gives them to one row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from virtual_cases import (
    TUNINGS,
    alone,
    examples,
    kept,
    logits_of,
    peft_logits,
    policy_of,
    step,
    write_peft,
)

from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, complete
from posttrain_dist.data.packs.collate import collate, filler
from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.flow import Example
from posttrain_dist.models import Checkpointing
from posttrain_dist.models.architectures.packing_check import check_packing
from posttrain_dist.models.architectures.positions import check_row_length
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.preflight import input_problems
from posttrain_dist.tuning.virtual import insert_virtual_tokens, prepend

each_tuning = pytest.mark.parametrize("name", TUNINGS)
GEMMA = {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}


@pytest.fixture(scope="module", params=["Llama", "Gemma2"])
def folder(request, tmp_path_factory, builders):
    target = tmp_path_factory.mktemp(request.param)
    return builders.model(target, request.param, **(GEMMA if request.param == "Gemma2" else {}))


def close(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert float(value.norm()) > 0
        assert float((found[key] - value).norm()) <= tolerance * float(value.norm()), key


@each_tuning
def test_packed_equals_alone_and_order_changes_nothing(folder, name):
    tuning = TUNINGS[name](tokens=3)
    policy = policy_of(folder, tuning)
    packed, gradients = step(policy, examples())
    singles = [step(policy, [row]) for row in alone(examples())]
    total = sum(float(loss.total.detach()) for loss, _ in singles)
    assert float(packed.total.detach()) == pytest.approx(total, rel=1e-6)
    assert set(gradients) == {
        n for n, _ in policy.causal_lm.named_parameters() if tuning.trained(n)
    }
    close(gradients, {key: sum(own[key] for _, own in singles) for key in gradients})
    first, second, *children, last = examples()
    moved, others = step(policy, [last, second, *children, first])
    assert float(moved.total.detach()) == pytest.approx(total, rel=1e-6)
    close(others, gradients)
    torch.testing.assert_close(moved.channels_CK, packed.channels_CK, rtol=1e-6, atol=0)
    # Slots are nowhere counted: every weight of the table is one of the data.
    weights = sum(float(row.weight_L.sum()) for row in examples())
    assert float(packed.channels_CK[:, 1].sum()) == weights


@each_tuning
def test_the_saved_folder_gives_the_same_logits_in_plain_peft(folder, name, tmp_path):
    tuning = TUNINGS[name](tokens=3)
    policy = policy_of(folder, tuning)
    saved = tuning.to_adapter(kept(policy, tuning), policy.config.to_dict())
    write_peft(tmp_path / "adapter", saved)
    ids_L = np.concatenate([row.input_ids_L for row in examples()])
    slots = 0 if name == "prefix" else 3
    expected = peft_logits(folder, tmp_path / "adapter", ids_L, slots)
    torch.testing.assert_close(logits_of(policy, ids_L), expected, rtol=1e-5, atol=1e-5)
    base = logits_of(policy_of(folder, None), ids_L)
    assert float((base - expected).abs().max()) > 0.1  # the adapter does something


@each_tuning
def test_no_virtual_token_is_the_base_bit_for_bit(folder, name):
    policy, base = policy_of(folder, TUNINGS[name](tokens=0)), policy_of(folder, None)
    batch = collate(examples())
    found, expected = (each(batch, TokenLoss(), TokenCount(1.0)) for each in (policy, base))
    assert torch.equal(found.nll_N, expected.nll_N)
    assert torch.equal(found.channels_CK, expected.channels_CK)


@each_tuning
def test_recomputed_activations_give_the_same_gradients(folder, name):
    tuning = TUNINGS[name](tokens=3)
    plain = step(policy_of(folder, tuning), examples())
    full = policy_of(folder, tuning, activation_checkpointing=Checkpointing.full).train()
    again = step(full, examples())
    assert torch.equal(plain[0].total, again[0].total)
    close(again[1], plain[1])


@each_tuning
def test_the_checks_at_the_start_and_fillers_pass(folder, name, monkeypatch):
    policy = policy_of(folder, TUNINGS[name](tokens=3))
    rows = collate(examples())
    assert policy.check_head(rows) < 1e-4
    # An architecture that no table vouches for: each sample beside itself alone, prefix and all.
    monkeypatch.setattr("posttrain_dist.models.policy.TRAINED", frozenset())
    assert policy.check_head(rows) < 1e-4

    def without_parents(model, inputs, logits_TV):
        check_packing(model, {**inputs, "parent_S": [-1] * len(rows.parent_S)}, logits_TV)

    monkeypatch.setattr("posttrain_dist.models.policy.check_packing", without_parents)
    with pytest.raises(ModelError, match="computes other logits for a sample"):
        policy.check_head(rows)
    monkeypatch.undo()
    assert max(policy.check_parity(rows).values()) < 1e-4
    nothing = policy(filler(TokenLoss()), TokenLoss(), TokenCount(3.0))
    assert float(nothing.total.detach()) == 0
    nothing.total.backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in policy.parameters() if p.requires_grad)


@each_tuning
def test_an_adapter_goes_back_into_the_model_or_is_refused(tiny_llama, name):
    tuning = TUNINGS[name](tokens=3)
    policy = policy_of(tiny_llama, tuning)
    network = policy.config.to_dict()
    before = kept(policy, tuning)
    saved = tuning.to_adapter(before, network)
    if name == "p_tuning":
        with pytest.raises(ModelError, match=r"tuning=prompt tuning\.init_from="):
            tuning.from_adapter(saved, network)
        return
    back = tuning.from_adapter(saved, network)
    assert back.keys() == before.keys() and all(torch.equal(back[k], before[k]) for k in back)
    with pytest.raises(ModelError, match=r"is \[3, \d+\], and this run has \[4, \d+\]"):
        replace(tuning, tokens=4).from_adapter(saved, network)
    other = saved._replace(config={**saved.config, "peft_type": "LORA"})
    with pytest.raises(ModelError, match="an adapter of the type LORA"):
        tuning.from_adapter(other, network)
    with pytest.raises(ModelError, match="prompt_embeddings is not there"):
        tuning.from_adapter(saved._replace(tensors={}), network)


@each_tuning
def test_only_matrices_that_multiply_decay(tiny_llama, name):
    tuning = TUNINGS[name](tokens=3)
    trained = kept(policy_of(tiny_llama, tuning), tuning)
    decayed = {n for n, tensor in trained.items() if tuning.decays(n, tensor.shape)}
    assert decayed == {n for n in trained if "mlp_head" in n and n.endswith("weight")}
    assert not tuning.mergeable and "none of its weights can take in" in tuning.unmergeable


def test_gradients_of_many_samples_add_up_in_float32():
    """Each of 300 samples adds 1; a sum in bfloat16 stands still at 256."""
    rows = [Example(np.full(1, 5, np.int32), np.ones(1, np.float32), 0, i) for i in range(300)]
    model = torch.nn.Module()
    model.get_input_embeddings = lambda: torch.nn.Embedding(9, 4, dtype=torch.bfloat16)
    prompt_PD = torch.zeros(2, 4, requires_grad=True)
    prepend(model, prompt_PD, 2, insert_virtual_tokens(collate(rows), 2)).sum().backward()
    assert prompt_PD.grad.tolist() == [[300.0] * 4] * 2


# ------------------------------------------------------------------------------------ bad input


def test_more_virtual_tokens_than_the_context_are_refused(tiny_llama):
    learned = {"model_type": "gpt2", "n_positions": 64}
    check_row_length(learned, 60, 4)
    with pytest.raises(ConfigError, match=r"is 60, with tuning.tokens 65, and .* 64 positions"):
        check_row_length(learned, 60, 5)
    with pytest.raises(ConfigError, match=r"tuning.tokens: is 64, and the context .* 64 tokens"):
        check_row_length(learned, 1, 64)
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(max_length=64),
            tuning=TUNINGS["prompt"](tokens=256),
        )
    )
    where = [(problem.where, problem.fix) for problem in input_problems(config)]
    assert ("tuning.tokens", "set tuning.tokens far below 256") in where


@pytest.mark.parametrize(
    ("name", "model_type", "part"),
    [
        ("prompt", "gemma4_text", "embeddings of its own for each token"),
        ("p_tuning", "gemma4_text", "embeddings of its own for each token"),
        ("prefix", "gemma4_text", "keys and values of several widths"),
        ("prefix", "youtu", "keys and values of several widths"),
        ("prefix", "diffllama", "joins its values in pairs"),
    ],
)
def test_models_that_it_does_not_fit_are_named(name, model_type, part):
    from small_configs import small_config

    network = small_config(model_type).to_dict()
    with pytest.raises(ModelError, match=f"{model_type} model .*{part}"):
        TUNINGS[name]().check_network(network)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_every_architecture_equals_plain_peft_or_is_refused(name, tmp_path):
    """Each sample of a packed row has the logits that `peft` gives it in a row of its own."""
    import transformers
    from peft import PeftModel
    from posttrain_kernels import linear_cross_entropy, linear_logprob
    from small_configs import VARIANTS, small_config

    from posttrain_dist.models.architectures.known import TRAINED
    from posttrain_dist.models.attention import EAGER, SDPA, register
    from posttrain_dist.models.head import HeadKernels
    from posttrain_dist.models.policy import Policy

    register()
    rows = [Example(row.input_ids_L, row.weight_L, 0, i) for i, row in enumerate(examples()[:2])]

    def build(model_type, changes, attention):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            small_config(model_type, changes), dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.5))
        return model.eval()

    refused = set()
    for i, (model_type, changes) in enumerate([*((t, None) for t in sorted(TRAINED)), *VARIANTS]):
        tuning = TUNINGS[name](tokens=4)
        config = small_config(model_type, changes)
        try:
            tuning.check_network(config.to_dict())
        except ModelError:
            refused.add(model_type)
            continue
        capped = getattr(config, "attn_logit_softcapping", None)
        model = build(model_type, changes, EAGER if capped else SDPA)
        tuning.attach(model)
        policy = Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 1, tuning)
        with torch.no_grad():
            for tensor in kept(policy, tuning).values():
                tensor.normal_()
        saved = tuning.to_adapter(kept(policy, tuning), config.to_dict())
        write_peft(tmp_path / f"{i}", saved)
        row = policy._extended(collate(rows))
        with torch.no_grad():
            logits = model(**policy._inputs(row)).logits[0]
        own = PeftModel.from_pretrained(build(model_type, changes, "eager"), tmp_path / f"{i}")
        slots = 4 if name == "prompt" else 0
        for start, example in zip(row.cu_seqlens_S, rows, strict=False):
            ids = torch.from_numpy(example.input_ids_L).long()[None]
            with torch.no_grad():
                expected = own(input_ids=ids).logits[0, slots:]
            found = logits[start + slots : start + slots + len(ids[0])]
            scale = max(1.0, float(expected.abs().max()))
            assert float((found - expected).abs().max()) <= 1e-5 * scale, model_type
    several = {"gemma4_text", "gemma4_unified_text"}
    assert refused == (
        several if name == "prompt" else several | {"minicpm3", "youtu", "diffllama"}
    )
