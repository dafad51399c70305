"""A config.json that cannot be planned: one message that names it, from what the planner calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.errors import ModelError, PosttrainError
from posttrain_dist.models.architectures.positions import learned_positions
from posttrain_dist.models.architectures.shape_files import shape_folder
from posttrain_dist.models.folder import read_network
from posttrain_dist.models.network.build_network import build_network

QWEN: dict[str, Any] = json.loads((shape_folder("shape:qwen3-0.6b") / "config.json").read_text())
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
FP8 = {"quantization_config": {"quant_method": "fp8"}}
EIGHT_BITS = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
NF4 = {
    "quantization_config": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
}


def fault(tmp_path: Path, **changes: Any) -> PosttrainError:
    """What is said of Qwen3 0.6B with other values; null: the key is left out."""
    config = {key: value for key, value in {**QWEN, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        read_network(str(tmp_path))
    assert caught.value.where == str(tmp_path / "config.json")
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_hidden_layers": None}, "has no num_hidden_layers"),
        ({"num_attention_heads": None}, "has no num_attention_heads"),
        ({"intermediate_size": None}, "has no intermediate_size"),
        ({"vocab_size": None}, "has no vocab_size"),
        ({"model_type": None}, "has no model_type"),
        ({"hidden_size": -1024}, "hidden_size is -1024, not a positive whole number"),
        ({"intermediate_size": 0}, "intermediate_size is 0, not a positive whole number"),
        ({"vocab_size": 1e5}, "vocab_size is 100000.0, not a positive whole number"),
        ({"num_attention_heads": True}, "num_attention_heads is True, not a positive whole"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads is '8', not a positive whole number"),
        ({"head_dim": [128]}, "head_dim is [128], not a positive whole number"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1,000,000,000,000, above 10,000"),
        ({"vocab_size": 10**30}, "above 2,147,483,647"),
        ({"num_key_value_heads": 5}, "num_key_value_heads = 5 does not divide"),
        (
            {"model_type": "llama", "head_dim": None, "hidden_size": 1000},
            "and there is no head_dim",
        ),
        ({"layer_types": ["full_attention"] * 27}, "layer_types has 27 entries, and num_hidden_"),
        ({"layer_types": 28}, "holds a size that is none"),
        ({"use_sliding_window": True, "sliding_window": "4k"}, "sliding_window is '4k'"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true', neither true nor false"),
        ({"attention_bias": 1}, "attention_bias is 1, neither true nor false"),
    ],
)
def test_a_size_that_is_missing_or_none(changes, what, tmp_path):
    assert what in fault(tmp_path, **changes).what


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "mixture-of-experts model, not support",
        ),
        ({"num_experts": 128}, "is a mixture-of-experts model (num_experts), not supported yet"),
        (
            {"model_type": "gemma3", "text_config": {"hidden_size": 8}},
            "is a multimodal model (text_",
        ),
        (
            {"model_type": "qwen2_5_vl", "vision_config": {"depth": 2}},
            "is a multimodal model (vision",
        ),
        ({"model_type": "bert"}, "is built for attention in both directions, not as a causal LM"),
        ({"architectures": ["Qwen3ForTokenClassification"]}, "is not a causal LM: its archi"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "is a classifier of 2 labels"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder model"),
        ({"model_type": "mamba"}, "mamba has layers that carry a state from token to token"),
        (GPTQ, "holds quantised weights, by gptq, which cannot be trained on"),
        (FP8, "holds quantised weights, by fp8, which cannot be trained on"),
        (EIGHT_BITS, "holds quantised weights, by bitsandbytes in 8 bits, not in NF4"),
    ],
)
def test_what_is_no_dense_causal_lm(changes, what, tmp_path):
    assert what in fault(tmp_path, **changes).what


def test_several_faults_are_one_message_each(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, **GPTQ, "num_experts": 4}))
    with pytest.raises(PosttrainError) as caught:
        read_network(str(tmp_path))
    assert "gptq" in str(caught.value) and "mixture-of-experts" in str(caught.value)


def test_weights_that_are_stored_in_nf4_are_planned(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, **NF4}))
    assert read_network(str(tmp_path)).num_parameters == 596_049_920


def test_a_type_that_training_tries_has_no_tensors_here():
    with pytest.raises(ModelError) as caught:
        build_network({**QWEN, "model_type": "trocr"}, "m/config.json")
    assert caught.value.what == (
        "is of the type trocr, whose tensors are not known: its memory cannot be planned"
    )
    assert caught.value.where == "m/config.json" and "named" in caught.value.fix


def test_learned_positions_that_are_not_said_are_those_of_the_architecture():
    assert learned_positions({"model_type": "gpt2"}) == 1024
    assert learned_positions({"model_type": "gpt2", "n_positions": 64}) == 64
    assert learned_positions(QWEN) is None


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_what_is_no_json_object(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="is not"):
        read_network(str(tmp_path))
