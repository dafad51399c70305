"""Which layers a word, a name or a pattern means, in the architectures that are trained."""

from __future__ import annotations

import re

import pytest
import torch
import tuned_models as tuned
from small_configs import small_config

from posttrain_dist.config import ModelConfig, RunConfig, complete
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ConfigError
from posttrain_dist.models.architectures.known import TRAINED
from posttrain_dist.models.attention import EAGER, register
from posttrain_dist.models.layers import decoder_layers
from posttrain_dist.models.policy import Policy
from posttrain_dist.tuning.base import Quantize
from posttrain_dist.tuning.ia3 import Ia3
from posttrain_dist.tuning.injection.targets import find_targets, keys_values_and_mlp, linears
from posttrain_dist.tuning.lora import Lora, LoraInit

# Conv1D and fused projections, an MLP that stands in the layer, keys and values of low rank.
SAMPLE = {"gpt2", "opt", "minicpm3"}
each_type = pytest.mark.parametrize(
    "model_type",
    [pytest.param(t, marks=[] if t in SAMPLE else pytest.mark.slow) for t in sorted(TRAINED)],
)


def build(model_type: str) -> torch.nn.Module:
    import transformers

    register()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        small_config(model_type), dtype=torch.float32, attn_implementation=EAGER
    )


def last_names(found) -> set[str]:
    return {one.name.rpartition(".")[2] for one in found}


def test_words_names_and_patterns():
    model = build("llama")
    every = {one.name for one in linears(model)}
    chosen = {key: find_targets(model, key) for key in ("all-linear", "attention", "mlp")}
    assert {one.name for one in chosen["all-linear"]} == every - {"lm_head"}
    assert last_names(chosen["attention"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert last_names(chosen["mlp"]) == {"gate_proj", "up_proj", "down_proj"}
    assert [one.name for one in find_targets(model, ["0.self_attn.q_proj", "lm_head"])] == [
        "model.layers.0.self_attn.q_proj",
        "lm_head",
    ]
    assert len(find_targets(model, "q_proj")) == 2  # a single name
    assert [o.name for o in find_targets(model, r"model[.]layers[.]1[.].*(up|down)_proj")] == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "query"], "'query' is no linear layer; the model has q_proj (2), k_proj (2)"),
        (["embed_tokens"], "'embed_tokens' is no linear layer but Embedding"),
        (["proj"], "'proj' is no linear layer;"),
        ("layers[.]7[.].*", "the pattern 'layers[.]7[.].*' matches no linear layer"),
        (".*norm", "down_proj (2), lm_head (1)"),
    ],
)
def test_what_matches_nothing_is_refused_with_what_there_is(targets, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        find_targets(build("llama"), targets)
    assert caught.value.where == "tuning.targets" and "all-linear" in caught.value.fix


@pytest.mark.parametrize(
    ("model_type", "tuning", "where", "message"),
    [
        ("llama", Lora(rank=17, targets=["k_proj"]), "tuning.rank", "dimension of model.layers.0"),
        ("llama", Lora(rank=4, targets=["lm_head"], dropout=0.1), "tuning.dropout", "the head"),
        ("gemma2", Lora(rank=4, targets=["lm_head"]), "tuning.targets", "with the embeddings"),
        (
            "gemma2",
            Lora(rank=4, modules_to_save=["embed_tokens"]),
            "tuning.modules_to_save",
            "with the head",
        ),
        ("llama", Lora(rank=4, modules_to_save=["nrm"]), "tuning.modules_to_save", "input_layer"),
        ("llama", Lora(rank=4, modules_to_save=["mlp"]), "tuning.modules_to_save", "a target, too"),
        ("llama", Ia3(targets=["lm_head", "k_proj"]), "tuning.targets", "is the head"),
    ],
)
def test_what_the_model_cannot_have_is_refused(model_type, tuning, where, message):
    for refuse in (
        lambda: tuning.attach(build(model_type)),
        lambda: tuning.check_network(small_config(model_type).to_dict()),  # before any load
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            refuse()
        assert caught.value.where == where


def test_what_config_json_can_have_is_let_through():
    network = small_config("llama").to_dict()
    Lora(rank=4, targets=["lm_head"], modules_to_save=["norm"]).check_network(network)
    Lora(rank=8).check_network(network)  # no size of config.json is below 8: no look is needed
    with pytest.raises(ConfigError, match="is 40, above the smaller dimension"):
        Lora(rank=40).check_network(network)
    Ia3().check_network(network)
    Lora(targets=["nothing"]).check_network({"model_type": "not_one_of_transformers"})
    quantised = network | {"quantization_config": {"quant_method": "bitsandbytes"}}
    Lora(rank=4).check_network(quantised)
    with pytest.raises(ConfigError, match="folder are quantised"):
        Lora(rank=4, init=LoraInit.pissa).check_network(quantised)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rank": 0}, "tuning.rank"),
        ({"alpha": 0.0}, "tuning.alpha"),
        ({"alpha": -1.0}, "tuning.alpha"),
        ({"dropout": 1.0}, "tuning.dropout"),
        ({"targets": "(q_proj"}, "tuning.targets"),
        ({"targets": []}, "tuning.targets"),
        ({"init": LoraInit.pissa, "freeze_a": True}, "tuning.freeze_a"),
        ({"init": LoraInit.pissa, "dropout": 0.1}, "tuning.dropout"),
        ({"init": LoraInit.pissa, "quantize": Quantize.nf4}, "tuning.init"),
        ({"freeze_a": True, "lr_ratio_b": 16.0}, "tuning.lr_ratio_b"),
        ({"modules_to_save": [""]}, "tuning.modules_to_save"),
    ],
)
def test_bad_values_are_found_before_any_load(changes, key):
    broken = [rule.key for rule in Lora(**changes).rules() if not rule.holds]
    assert broken == [key]
    with pytest.raises(ConfigError, match=re.escape(key)):
        complete(RunConfig(model=ModelConfig(path="tiny"), tuning=Lora(**changes))).check()


@each_type
def test_every_architecture_takes_lora_and_ia3(model_type):
    rows = tuned.examples()
    batch = collate(rows)
    for tuning in (Lora(rank=2), Ia3()):
        model = build(model_type)
        every = linears(model)
        layers = decoder_layers(model)
        before = Policy(build(model_type), tuned.KERNELS, 1).eval()
        tuning.attach(model)
        policy = Policy(model, tuned.KERNELS, 1, tuning).eval()
        with torch.no_grad():
            assert torch.equal(policy.hidden(batch), before.hidden(batch))
        tuned.scatter(model, tuning, 0.3)
        losses, gradients = tuned.run(policy, batch)
        names = {name.partition(".lora_")[0].partition(".ia3_l")[0] for name in gradients}
        if isinstance(tuning, Lora):  # all of the layers' linears, and not one outside
            assert names == {one.name for one in every if one.part != "outside"}
            assert len(gradients) == 2 * len(names)
        else:
            keys, second = keys_values_and_mlp(linears(build(model_type)))
            assert names == {one.name for one in (*keys, *second)}
            assert len(second) == len(layers) <= len(keys)
        assert all(bool(g.any()) for g in gradients.values()), model_type
        alone = torch.cat([tuned.run(policy, collate([row]))[0] for row in rows])
        torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-5)
        assert (losses - tuned.run(before, batch)[0]).abs().max() > 1e-4
