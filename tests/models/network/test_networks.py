"""The tensors that are read off a config.json are those of the model that transformers builds."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from small_configs import CHANGES, SLIDING, VARIANTS, small_config

from posttrain_dist.errors import ModelError
from posttrain_dist.models.architectures.known import TRAINED
from posttrain_dist.models.network.build_network import build_network
from posttrain_dist.models.network.families.table import FAMILIES
from posttrain_dist.models.network.tensors import Linear
from posttrain_dist.models.shape import ModelShape
from posttrain_dist.tuning.injection.targets import linears

# By default: one of each way to build a model.
SAMPLE = {"llama", "gpt2", "gpt_bigcode", "opt", "minicpm3", "cohere", "phi3", "gemma3_text"}
SAMPLE_VARIANTS = {"gemma4_text", "stablelm", "opt", "phi"}
# Switches, and other values of sizes: each is turned alone, and all switches together.
SWITCHES = (
    *("attention_bias", "mlp_bias", "use_bias", "use_qk_norm", "qk_layernorm", "use_qkv_bias"),
    *("use_parallel_residual", "tie_word_embeddings", "enable_bias", "do_layer_norm_before"),
    *("layer_norm_elementwise_affine", "_remove_final_layer_norm", "multi_query"),
    *("use_post_norm", "attention_out_bias", "use_sliding_window"),
)
OTHER_SIZES: dict[str, list[Any]] = {
    "head_dim": [6, 16],
    "num_attention_heads": [2, 8],
    "num_key_value_heads": [4, 2],
    "hidden_size": [48],
    "n_embd": [48],
    "intermediate_size": [40],
    "ffn_dim": [40],
    "n_inner": [40, None],
    "max_position_embeddings": [32],
    "n_positions": [32],
    "vocab_size": [100],
    "word_embed_proj_dim": [16, 40],
    "q_lora_rank": [None, 12],
    "kv_lora_rank": [24],
    "v_head_dim": [12],
    "qk_nope_head_dim": [6],
    "hidden_size_per_layer_input": [0, 12],
    "vocab_size_per_layer_input": [77],
    "global_head_dim": [12],
    "hidden_act": ["silu"],
}
# Of types whose heads have to be hidden_size wide together, sizes that are refused.
WHOLE_HEADS = {"helium", "bitnet"}


def built(config: Any) -> torch.nn.Module:
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))


def assert_same(config: Any) -> None:
    """Names, shapes, parameters and linear layers, and the windows of layers."""
    model = built(config)
    network = build_network(json.loads(json.dumps(config.to_dict(), default=str)))
    tensors = {tensor.name: tensor.shape for tensor in network.tensors()}
    assert tensors == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert network.num_parameters == sum(p.numel() for p in model.parameters())
    every = list(network.linears())
    assert set(every) == set(linears(model)) and len(every) == len(set(every))
    masks = [b.numel() for b in model.buffers() if b.dtype == torch.bool]
    assert network.buffer_bytes == sum(masks)
    if layer_types := getattr(config, "layer_types", None):
        window = config.sliding_window
        windows = [window if kind == SLIDING else None for kind in layer_types]
        assert list(network.shape.window_L) == windows


def sampled(values: Any, sample: set[str]) -> list[Any]:
    slow = [pytest.mark.slow]
    return [pytest.param(v, marks=() if v in sample else slow) for v in sorted(values)]


def test_every_trained_architecture_has_its_tensors():
    assert FAMILIES.keys() == TRAINED


@pytest.mark.parametrize("model_type", sampled(TRAINED, SAMPLE))
def test_tensors_are_those_of_the_built_model(model_type):
    assert_same(small_config(model_type))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        pytest.param(t, c, marks=() if t in SAMPLE_VARIANTS else [pytest.mark.slow])
        for t, c in VARIANTS
    ],
)
def test_so_are_those_of_other_forms_of_it(model_type, changes):
    assert_same(small_config(model_type, changes))


def changes_of(model_type: str) -> list[dict[str, Any]]:
    known = small_config(model_type).to_dict()
    switches = {name: not known[name] for name in SWITCHES if name in known}
    if model_type == "internlm3":  # both or none
        switches = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    single = [] if model_type == "internlm3" else [{k: v} for k, v in switches.items()]
    sizes = [
        {name: value}
        for name, values in OTHER_SIZES.items()
        if name in known or name == "head_dim" or name in CHANGES.get(model_type, {})
        for value in values
    ]
    return [*single, switches, *sizes]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(TRAINED))
def test_each_switch_and_each_size_of_a_config_changes_what_it_changes(model_type):
    """One at a time: a key that the table forgets, or takes for another's, shows."""
    for changes in changes_of(model_type):
        config = small_config(model_type, {**CHANGES.get(model_type, {}), **changes})
        if model_type in WHOLE_HEADS and not heads_are_whole(config):
            with pytest.raises(ModelError, match="not as wide together"):
                build_network(config.to_dict())
        else:
            assert_same(config)


def heads_are_whole(config: Any) -> bool:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return bool(heads * head_dim == config.hidden_size)


REQUIRED = {
    **dict.fromkeys(("hidden_size", "n_embd"), 640),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 7),
    **dict.fromkeys(("num_attention_heads", "n_head"), 160),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 96),
    "vocab_size": 300,
}


@pytest.mark.parametrize("model_type", sorted(TRAINED))
def test_a_key_that_is_left_out_is_what_the_architecture_takes(model_type):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    names = kind().to_dict()
    required = {key: value for key, value in REQUIRED.items() if key in names}
    if model_type in WHOLE_HEADS:
        required |= {"num_attention_heads": 20, "hidden_size": 2560}
    whole = build_network(kind(**required).to_dict())
    bare = build_network({"model_type": model_type, **required})
    assert bare.shape == whole.shape == ModelShape.of(kind(**required).to_dict())
    assert list(bare.tensors()) == list(whole.tensors())
    assert list(bare.linears()) == list(whole.linears())


def test_layers_that_are_alike_are_one_object():
    network = build_network(small_config("gemma4_text", dict(VARIANTS)["gemma4_text"]).to_dict())
    first, second, shared, last = network.layers
    assert first is not second and shared is not last
    # Sliding, full, and the two that use their keys with an MLP twice as wide.
    assert [layer.size for layer in (first, second)] != [layer.size for layer in (shared, last)]
    assert len({id(layer) for layer in build_network(small_config("llama").to_dict()).layers}) == 1


def test_a_linear_has_a_weight_and_a_bias():
    linear = Linear("mlp.c_fc", 3, 5, "mlp", bias=True, transposed=True)
    weight, bias = linear.tensors
    assert (weight.name, weight.shape, weight.size) == ("mlp.c_fc.weight", (3, 5), 15)
    assert (bias.name, bias.shape) == ("mlp.c_fc.bias", (5,))
