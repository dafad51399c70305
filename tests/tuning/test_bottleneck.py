"""Bottleneck adapters beside plain transformers with hooks, and the files of `adapters`."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob
from small_configs import small_config
from torch import nn

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.engine import AdamW
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.flow import Example
from posttrain_dist.models import Checkpointing, ModelConfig
from posttrain_dist.models.architectures.known import TRAINED
from posttrain_dist.models.attention import EAGER, SDPA, register
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.layers import checkpoint_activations
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.models.shape import ModelShape
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.base import fill_parameters
from posttrain_dist.tuning.bottleneck import Bottleneck, Nonlinearity, Placement

KERNELS = HeadKernels(linear_cross_entropy, linear_logprob)
TARGETS = 7.0
# What the layers of each type call their attention and the end of their MLP, if not the usual.
ATTENTION = {"gpt2": "attn", "gpt_bigcode": "attn", "gpt_neox": "attention"}
MLP = {"opt": "fc2", "biogpt": "fc2"}


def bottleneck(placement: str = "houlsby", **changes) -> Bottleneck:
    options = {"placement": Placement[placement], "reduction": 4, "scale": 0.5}
    return Bottleneck(nonlinearity=Nonlinearity.gelu, **{**options, **changes})


def samples() -> list[Example]:
    draw = np.random.default_rng(0)
    found = []
    for i, n in enumerate([5, 17, 2, 11]):
        weight_L = ((draw.random(n) < 0.6) | (np.arange(n) == 1)) * (np.arange(n) > 0)
        ids_L = draw.integers(5, 200, n).astype(np.int32)
        found.append(Example(ids_L, weight_L.astype(np.float32), channel=0, sample_id=i))
    return found


def build(config, attention):
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


def adapted(config, tuning, checkpointing="none") -> Policy:
    """The policy with adapters whose matrices are all drawn."""
    shape = ModelShape.of(config.to_dict())
    model = build(config, EAGER if shape.attention_softcap else SDPA)
    tuning.attach(model)
    draw_adapters(model)
    checkpoint_activations(
        model, ModelConfig(activation_checkpointing=Checkpointing[checkpointing])
    )
    return Policy(model, KERNELS, 1, tuning)


def draw_adapters(model) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bottleneck." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)


def alone(config, tuning, adapters):
    """Losses, and gradients of the adapters: transformers alone with hooks, row by row."""
    own = build(config, "eager")
    own.requires_grad_(False)
    layers = own.get_submodule(next(iter(adapters)).split(".layers.")[0].split(".h.")[0])
    layers = getattr(layers, "layers", None) or layers.h
    own_adapters = {name: t.detach().clone().requires_grad_() for name, t in adapters.items()}
    for i, layer in enumerate(layers):
        names = [MLP.get(config.model_type, "mlp")]
        if tuning.placement is Placement.houlsby:
            names.append(ATTENTION.get(config.model_type, "self_attn"))
        for name in names:
            mine = {
                key.split(".bottleneck.")[1]: tensor
                for key, tensor in own_adapters.items()
                if f".{i}.{name}.bottleneck." in key
            }
            assert len(mine) == 4

            def hook(module, args, output, mine=mine):
                first = output[0] if isinstance(output, tuple) else output
                read = args[0] if tuning.placement is Placement.parallel else first
                inner = nn.functional.gelu(read @ mine["down.weight"].T + mine["down.bias"])
                first = first + 0.5 * (inner @ mine["up.weight"].T + mine["up.bias"])
                return (first, *output[1:]) if isinstance(output, tuple) else first

            getattr(layer, name).register_forward_hook(hook)
    losses = []
    for sample in samples():
        ids_L = torch.from_numpy(sample.input_ids_L.astype(np.int64))
        logits_LV = own(input_ids=ids_L[None], use_cache=False).logits[0, :-1]
        nll_L = nn.functional.cross_entropy(logits_LV, ids_L[1:], reduction="none")
        losses.append(nll_L[torch.from_numpy(sample.weight_L[1:]) > 0])
    (torch.cat(losses).sum() / TARGETS).backward()
    return torch.cat(losses).detach(), {name: t.grad for name, t in own_adapters.items()}


def assert_exact(model_type, placement, checkpointing="none"):
    config, tuning = small_config(model_type), bottleneck(placement)
    policy = adapted(config, tuning, checkpointing)
    batch = collate(samples())
    policy.check_head(batch)
    policy.train(checkpointing != "none")
    loss = policy(batch, TokenLoss(), TokenCount(TARGETS))
    loss.total.backward()
    found = {n: p.grad for n, p in policy.causal_lm.named_parameters() if p.requires_grad}
    trained = {n: p for n, p in policy.causal_lm.named_parameters() if ".bottleneck." in n}
    assert found.keys() == trained.keys()
    expected_N, expected = alone(config, tuning, trained)
    torch.testing.assert_close(loss.nll_N[: batch.num_targets], expected_N, rtol=1e-5, atol=1e-5)
    for name, gradient in found.items():
        assert gradient is not None and expected[name].norm() > 0, name
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


SAMPLE = {
    ("llama", "houlsby"),  # the common names
    ("gemma2", "houlsby"),  # a norm behind each sublayer
    ("gpt2", "parallel"),  # other names, tuples, all rows kept
    ("gpt_neox", "houlsby"),  # attention and MLP side by side
    ("opt", "pfeiffer"),  # no module for the MLP
}
PAIRS = [
    pytest.param(t, p.name, marks=() if (t, p.name) in SAMPLE else [pytest.mark.slow])
    for t in sorted(TRAINED)
    for p in Placement
    if not (t in MLP and p is Placement.parallel)
]


@pytest.mark.parametrize(("model_type", "placement"), PAIRS)
def test_a_packed_row_has_the_losses_and_gradients_of_its_samples_alone(model_type, placement):
    assert_exact(model_type, placement)


def test_so_have_layers_that_compute_their_activations_again():
    assert_exact("llama", "houlsby", checkpointing="full")


def test_so_have_compiled_layers():
    from posttrain_dist.models.compiled import compile_layers

    batch, losses = collate(samples()), []
    for compiled in (False, True):
        policy = adapted(small_config("llama"), bottleneck("parallel"))
        if compiled:
            compile_layers(policy.causal_lm, backend="eager")
        loss = policy(batch, TokenLoss(), TokenCount(TARGETS))
        loss.total.backward()
        parameters = dict(policy.causal_lm.named_parameters())
        gradient = parameters["model.layers.1.mlp.bottleneck.down.weight"].grad
        losses.append((loss.nll_N.detach(), gradient))
    assert losses[0][1].abs().max() > 0
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def load(folder, tuning, seed=0):
    return load_model(
        ModelConfig(path=str(folder)),
        folder,
        dtype=torch.bfloat16,
        seed=seed,
        materialise=SingleEngine(AdamW(), torch.device("cpu")).materialise(),
        attach=tuning.attach,
    )


def test_it_begins_as_the_base_bit_for_bit_and_the_seed_draws_it(tiny_llama):
    import transformers

    tuning = bottleneck("houlsby")
    model = load(tiny_llama, tuning)
    own = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    ids = torch.arange(5, 50)[None]
    keywords = {
        "cu_seqlens": [0, 45],
        "bounds_S": torch.tensor([0, 45], dtype=torch.int32),
        "max_seqlen": 45,
        "parent_S": [-1],
    }
    own.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(model(ids, **keywords).logits, own(ids, **keywords).logits)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".", 3)[3].rsplit(".", 2)[0] for n in names} == {
        "mlp.bottleneck",
        "self_attn.bottleneck",
    }
    # down 8 x 32 + 8, up 32 x 8 + 32, in two places of two layers
    assert sum(dict(model.named_parameters())[n].numel() for n in names) == 4 * (264 + 288)
    assert {n for n, _ in model.named_parameters()} - names == {
        n for n, _ in own.named_parameters()
    }
    downs = [
        dict(m.named_parameters())["model.layers.0.mlp.bottleneck.down.weight"]
        for m in (model, load(tiny_llama, tuning), load(tiny_llama, tuning, seed=1))
    ]
    assert downs[0].dtype == torch.bfloat16 and downs[0].std() > 0.01
    assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])


def test_one_step_moves_what_is_behind_zero_and_two_move_all(tiny_llama):
    tuning, engine = bottleneck("houlsby"), SingleEngine(AdamW(), torch.device("cpu"))
    policy = Policy(load(tiny_llama, tuning), KERNELS, 1, tuning)
    engine.attach(policy)
    engine.train(True)
    start = {n: p.detach().clone() for n, p in policy.causal_lm.named_parameters()}
    batch = collate(samples())
    for moved in (("up.weight", "up.bias"), ("up.weight", "up.bias", "down.weight", "down.bias")):
        loss = engine.forward(batch, TokenLoss(), TokenCount(TARGETS))
        engine.backward(loss.total, last=True)
        engine.step(1e-2)
        parameters = dict(policy.causal_lm.named_parameters())
        changed = {n for n in start if not torch.equal(start[n], parameters[n])}
        assert changed == {n for n in start if ".bottleneck." in n and n.endswith(moved)}


# ------------------------------------------------------------------------------------- the files


LLAMA_NAMES = [
    "model.layers.0.attention_adapters.adapters.default.adapter_down.0.bias",
    "model.layers.0.attention_adapters.adapters.default.adapter_down.0.weight",
    "model.layers.0.attention_adapters.adapters.default.adapter_up.bias",
    "model.layers.0.attention_adapters.adapters.default.adapter_up.weight",
    "model.layers.0.output_adapters.adapters.default.adapter_down.0.bias",
    "model.layers.0.output_adapters.adapters.default.adapter_down.0.weight",
    "model.layers.0.output_adapters.adapters.default.adapter_up.bias",
    "model.layers.0.output_adapters.adapters.default.adapter_up.weight",
]
GPT2_NAMES = [
    "transformer.h.0.output_adapters.adapters.default.adapter_down.0.bias",
    "transformer.h.0.output_adapters.adapters.default.adapter_down.0.weight",
    "transformer.h.0.output_adapters.adapters.default.adapter_up.bias",
    "transformer.h.0.output_adapters.adapters.default.adapter_up.weight",
]


def kept_of(model, tuning):
    return {n: p.detach().clone() for n, p in model.named_parameters() if tuning.kept(n)}


@pytest.mark.parametrize(
    ("model_type", "placement", "names"),
    [("llama", "houlsby", LLAMA_NAMES), ("gpt2", "pfeiffer", GPT2_NAMES)],
)
def test_the_files_are_those_of_the_adapters_library(model_type, placement, names):
    config, tuning = small_config(model_type), bottleneck(placement)
    network = config.to_dict()
    model = adapted(config, tuning).causal_lm
    saved = tuning.to_adapter(kept_of(model, tuning), network)
    second = [name.replace(".0.", ".1.", 1) for name in names]
    assert sorted(saved.tensors) == sorted(names + second)
    # Its `BnConfig`: what a folder of the library has to say for the same function.
    found = json.loads(json.dumps(saved.config))
    assert found["version"] == "adapters.1.3.0" and found["hidden_size"] == 32
    assert found["name"] == "default" and found["model_type"] == model_type
    expected = {
        "mh_adapter": placement == "houlsby",
        "output_adapter": True,
        "non_linearity": "gelu",
        "reduction_factor": 4,
        "scaling": 0.5,
        "original_ln_before": False,
        "original_ln_after": True,
        "is_parallel": False,
    }
    assert expected.items() <= found["config"].items() and "architecture" not in found["config"]
    assert isinstance(found["config"]["scaling"], float)
    other = adapted(config, tuning).causal_lm
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if tuning.trained(name):
                parameter.zero_()
    named = {n.replace(".default.", ".mine."): t for n, t in saved.tensors.items()}
    fill_parameters(other, tuning.from_adapter(saved._replace(tensors=named), network))
    ids = torch.arange(5, 20)[None]
    other.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_a_parallel_adapter_is_none_that_the_library_would_load():
    config, tuning = small_config("llama"), bottleneck("parallel")
    saved = tuning.to_adapter(kept_of(adapted(config, tuning).causal_lm, tuning), config.to_dict())
    # It maps this key to a class and knows: prefix_tuning, lora, mtl_lora, union, prompt_tuning,
    # reft, or none.
    assert saved.config["config"]["architecture"] == "parallel_beside_the_mlp"
    assert tuning.from_adapter(saved, config.to_dict()).keys() == {
        f"model.layers.{layer}.mlp.bottleneck.{module}.{kind}"
        for layer in (0, 1)
        for module in ("down", "up")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placement": Placement.pfeiffer}, "mh_adapter is True, not False"),
        ({"reduction": 8}, "reduction_factor is 4, not 8"),
        ({"nonlinearity": Nonlinearity.silu}, "non_linearity is 'gelu', not 'silu'"),
        ({"scale": 1.0}, "scaling is 0.5, not 1.0"),
    ],
)
def test_an_adapter_of_another_function_is_refused(change, message):
    config, tuning = small_config("llama"), bottleneck("houlsby")
    saved = tuning.to_adapter(kept_of(adapted(config, tuning).causal_lm, tuning), config.to_dict())
    with pytest.raises(ModelError, match=message):
        replace(tuning, **change).from_adapter(saved, config.to_dict())
    lacking = dict(list(saved.tensors.items())[1:])
    with pytest.raises(ModelError, match="has 15 tensors, and the model's layers need 16"):
        tuning.from_adapter(saved._replace(tensors=lacking), config.to_dict())
    with pytest.raises(ModelError, match="is no bottleneck adapter"):
        tuning.from_adapter(saved._replace(config={"peft_type": "LORA"}), config.to_dict())


@pytest.mark.parametrize(
    ("model_type", "tuning", "key", "message"),
    [
        ("llama", bottleneck(reduction=64), "tuning.reduction", "hidden size is 32"),
        ("opt", bottleneck("parallel"), "tuning.placement", "no module 'mlp': they have fc2"),
    ],
)
def test_what_cannot_be_is_refused(model_type, tuning, key, message):
    config = small_config(model_type)
    for refuse in (
        lambda: tuning.check_network(config.to_dict()),  # before anything is loaded
        lambda: tuning.attach(build(config, "eager")),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            refuse()
        assert error.value.where == key


def test_a_nonlinearity_is_never_merged():
    assert not bottleneck().mergeable and "gelu between its matrices" in bottleneck().unmergeable
