"""The sizes that are read from config.json are those of the model that transformers builds."""

from __future__ import annotations

import json

import pytest
from small_configs import small_config

from posttrain_dist.errors import ModelError
from posttrain_dist.models.shape import ModelShape

CASES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Llama tied": {"tie_word_embeddings": True},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 6},
    "Gemma": {},
    "Gemma2": {"sliding_window": 6},
    "Gemma3Text": {"sliding_window": 6},
    "Granite": {"logits_scaling": 2.0},
}
SIZE = {
    "vocab_size": 220,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 1,
}
WINDOWS = {
    "Qwen2": (None, 6, 6),
    "Mistral": (6, 6, 6),
    "Gemma2": (6, None, 6),
    "Gemma3Text": (6, 6, 6),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_those_of_the_built_model(name, tmp_path):
    import transformers

    architecture = name.partition(" ")[0]
    config = getattr(transformers, f"{architecture}Config")(**{**SIZE, **CASES[name]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    shape = ModelShape.of(json.loads((tmp_path / "config.json").read_text()))
    assert shape == ModelShape.of(config.to_dict())
    layer = model.get_decoder().layers[0]
    heads = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
    sizes = (shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim)
    assert sizes == tuple(len(weight) for weight in heads)
    assert shape.window_L == WINDOWS.get(architecture, (None,) * 3)
    scales = {"Gemma2": (30.0, 50.0, 1.0), "Granite": (None, None, 0.5)}
    wanted = scales.get(architecture, (None, None, 1.0))
    assert (shape.softcap, shape.attention_softcap, shape.logit_scale) == wanted


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mistral", "Gemma2", "Gemma3Text", "Cohere"])
def test_a_key_that_is_left_out_is_what_the_architecture_takes(name):
    import transformers

    whole = getattr(transformers, f"{name}Config")().to_dict()
    sizes = {"model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    sizes |= {"vocab_size", "intermediate_size"}
    if name == "Qwen3":  # whether windows are used is a switch of its own
        assert whole["use_sliding_window"] is False
    bare = {key: whole[key] for key in sizes}
    assert ModelShape.of(bare) == ModelShape.of(whole)


@pytest.mark.parametrize(
    ("model_type", "widths", "scale"),
    [
        ("llama", (8, 8), 1.0),
        ("gemma4_text", (16, 16), 1.0),  # wider where all tokens are attended to
        ("minicpm3", (12, 8), 8 / 32),  # dim_model_base / hidden_size
        ("youtu", (12, 8), 1.0),
        ("hyperclovax", (8, 8), 0.5),
        ("granite", (8, 8), 1 / 2.0),
    ],
)
def test_the_widest_head_and_the_scale_of_the_logits(model_type, widths, scale):
    shape = ModelShape.of(small_config(model_type).to_dict())
    assert (shape.widest_head, shape.value_head_dim) == widths
    assert shape.logit_scale == scale


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("llama", "attention_dropout"),
        ("gpt2", "attn_pdrop"),
        ("gpt_bigcode", "attn_pdrop"),
        ("biogpt", "attention_probs_dropout_prob"),
    ],
)
def test_dropout_of_attention_under_each_of_its_names(model_type, key):
    config = small_config(model_type, {key: 0.3}).to_dict()
    assert ModelShape.of(config).attention_dropout == 0.3
    del config[key]  # as the architecture has it
    usual = getattr(small_config(model_type), key)
    assert ModelShape.of(config).attention_dropout == usual


def test_gpt2_has_other_names_and_a_missing_size_is_named():
    import transformers

    shape = ModelShape.of(transformers.GPT2Config().to_dict())
    assert (shape.hidden_size, shape.num_layers, shape.num_heads) == (768, 12, 12)
    assert (shape.intermediate_size, shape.head_dim, shape.tied) == (3072, 64, True)
    with pytest.raises(ModelError, match=r"folder/config.json: has no num_hidden_layers"):
        ModelShape.of({"hidden_size": 8}, where="folder/config.json")
    with pytest.raises(ModelError, match="hidden_size is 'wide'"):
        ModelShape.of({"hidden_size": "wide"})
