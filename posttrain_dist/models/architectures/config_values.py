"""Values of a config.json that transformers refuses, or that no training could use. No torch.

Sizes are `models/shape.py`'s. tests/models/network/test_config_values.py asks transformers of every
key of every architecture that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain_dist.models.architectures.rope_values import rope_faults

ACTIVATIONS = frozenset(
    {
        *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python"),
        *("gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear"),
        *("mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu"),
        *("sqrtsoftplus", "swish", "tanh", "xielu"),
    }
)
DTYPES = frozenset(
    {
        *("float", "half", "double", "bfloat16", "float16", "float32", "float64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        "float4_e2m1fn_x2",
    }
)
LAYER_KINDS = frozenset({"full_attention", "sliding_attention"})
_NO_PADDING = {"gpt2", "gpt_bigcode", "gpt_neox"}  # whose embedding does not know the padding

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_SWITCHES = (
    *("_remove_final_layer_norm", "add_cross_attention", "attention_bias", "attention_k_eq_v"),
    *("attention_out_bias", "attention_softmax_in_fp32", "do_layer_norm_before", "enable_bias"),
    *("enable_moe_block", "is_decoder", "is_encoder_decoder", "layer_norm_elementwise_affine"),
    *("mlp_bias", "multi_query", "output_hidden_states", "qk_layernorm"),
    *("reorder_and_upcast_attn", "return_dict", "rope_interleave", "scale_embedding"),
    *("scale_attention_softmax_in_fp32", "scale_attn_by_inverse_layer_idx", "scale_attn_weights"),
    *("summary_proj_to_labels", "summary_use_proj", "tie_word_embeddings", "use_bias"),
    *("use_cache", "use_double_wide_mlp", "use_parallel_residual", "use_post_norm", "use_qk_norm"),
    *("use_qkv_bias", "use_sliding_window"),
)
# Numbers that must be written with a point, as transformers has it.
_POINT = (
    *("attn_logit_softcapping", "clip_qkv", "embedding_initializer_range"),
    *("final_logit_softcapping", "init_std", "initializer_range", "lambda_std_dev"),
    *("layer_norm_eps", "layer_norm_epsilon", "logit_scale", "norm_eps", "norm_epsilon"),
    "rms_norm_eps",
)
_NUMBERS = (
    *("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"),
    *("scale_depth", "scale_emb"),
)
_SHARES = (
    *("activation_dropout", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"),
    *("classifier_dropout", "dropout", "embd_pdrop", "embedding_dropout", "hidden_dropout"),
    *("hidden_dropout_prob", "layerdrop", "resid_pdrop", "residual_dropout"),
    "summary_first_dropout",
)
_POSITIVE = (
    *("dim_model_base", "kv_lora_rank", "max_position_embeddings", "moe_intermediate_size"),
    *("n_positions", "no_rope_layer_interval", "num_experts", "original_max_position_embeddings"),
    *("pretraining_tp", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    *("query_pre_attn_scalar", "top_k_experts", "v_head_dim", "word_embed_proj_dim"),
)
_COUNTS = (
    *("chunk_size_feed_forward", "hidden_size_per_layer_input", "max_window_layers"),
    *("num_kv_shared_layers", "sliding_window", "vocab_size_per_layer_input"),
)
_IDS = ("bos_token_id", "pad_token_id", "eod_token_id")
# What may be null: everywhere but in a few types, and in a few types only.
_NULL = {
    *_IDS,
    *("attention_multiplier", "attn_logit_softcapping", "clip_qkv", "dim_model_base", "dtype"),
    *("embedding_initializer_range", "final_logit_softcapping", "lambda_std_dev", "logit_scale"),
    *("moe_intermediate_size", "num_experts", "output_hidden_states", "q_lora_rank"),
    *("return_dict", "rope_interleave", "scale_depth", "sliding_window"),
    *("sliding_window_pattern", "top_k_experts", "torch_dtype", "use_bias"),
    *("use_bidirectional_attention", "use_qk_norm", "v_head_dim", "word_embed_proj_dim"),
}
_NEVER_NULL = {
    *(("cohere2", "logit_scale"), ("cwm", "bos_token_id"), ("cwm", "sliding_window")),
    *(("granite", "attention_multiplier"), ("starcoder2", "use_bias")),
}
# Sizes that may be left out, and not be null: transformers has others for these types.
_NEVER_NULL_SIZES = {
    "head_dim": {
        *("cwm", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "glm4"),
        *("helium", "ministral3", "qwen3", "vaultgemma"),
    },
    "num_key_value_heads": {
        *("cwm", "exaone4", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm4", "helium"),
        *("gemma4_unified_text", "ministral", "ministral3", "mistral", "stablelm", "starcoder2"),
        *("vaultgemma", "youtu"),
    },
}
_NULL_IN = {
    "attention_dropout": {
        *("bitnet", "cohere", "diffllama", "gemma2", "gemma3_text", "gemma4_text", "glm", "jais2"),
        *("gemma4_unified_text", "llama", "minicpm3", "phi", "vaultgemma", "youtu"),
    },
    "initializer_range": {"youtu"},
    "layer_norm_eps": {"cohere"},
    "pretraining_tp": {"llama", "minicpm3"},
    "use_cache": {"ernie4_5"},
}


def value_faults(config: Mapping[str, Any], head_dim: int) -> list[str]:
    """What is wrong with the values of a config.json of a type that is trained, a sentence each.

    Args:
        config: whose sizes were read.
        head_dim: of the part of a head that is rotated.
    """
    found = []
    model_type = str(config.get("model_type"))
    for names, holds, what in (*_RULES, *_RULES_OF.get(model_type, ())):
        for name in names:
            null = name in config and config[name] is None
            right = _may_be_null(model_type, name) if null else holds(config.get(name))
            if name in config and not right:
                found.append(f"{name} is {_shown(config[name])}, {what}")
    found += [
        f"{name} is null; without the key it has its default"
        for name, types in _NEVER_NULL_SIZES.items()
        if name in config and config[name] is None and model_type in types
    ]
    return [*found, *_layer_faults(config), *_token_faults(config), *rope_faults(config, head_dim)]


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no switch."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _has_point(value: Any) -> bool:
    return isinstance(value, float) and 0 <= value < math.inf


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, and no switch."""
    return isinstance(value, int) and not isinstance(value, bool)


def _may_be_null(model_type: str, name: str) -> bool:
    anywhere = name in _NULL and (model_type, name) not in _NEVER_NULL
    return anywhere or model_type in _NULL_IN.get(name, ())


def _layer_faults(config: Mapping[str, Any]) -> Iterator[str]:
    kinds = config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and _among(kinds, LAYER_KINDS)):
        yield f"layer_types is {_shown(kinds)}, not a list of {' and '.join(sorted(LAYER_KINDS))}"
    rotated = config.get("no_rope_layers")
    if rotated is not None and not (isinstance(rotated, list) and all(map(is_whole, rotated))):
        yield f"no_rope_layers is {_shown(rotated)}, not a list of 0 and 1"
    for name in ("id2label", "label2id"):
        found = config.get(name)
        ids = found.keys() if name == "id2label" and isinstance(found, Mapping) else ()
        numbered = all(is_whole(key) or str(key).isdigit() for key in ids)
        if found is not None and not (isinstance(found, Mapping) and numbered):
            yield f"{name} is {_shown(found)}, not a table of names and numbers"


def _token_faults(config: Mapping[str, Any]) -> Iterator[str]:
    ends, size, padding = (config.get(k) for k in ("eos_token_id", "vocab_size", "pad_token_id"))
    if ends is not None and not all(map(is_whole, ends if isinstance(ends, list) else [ends])):
        yield f"eos_token_id is {_shown(ends)}, neither a token id nor a list of them"
    asks = isinstance(padding, int) and config.get("model_type") not in _NO_PADDING
    if asks and isinstance(size, int) and padding not in range(-size, size):
        yield f"pad_token_id is {padding}, and vocab_size is {size}: there is no such token"


def _among(values: list[Any], names: frozenset[str]) -> bool:
    return all(isinstance(value, str) and value in names for value in values)


def _shown(value: Any) -> str:
    text = repr(value) if value is not None else "null"
    return text if len(text) <= 60 else f"{text[:57]}..."


_Rule = tuple[tuple[str, ...], Callable[[Any], bool], str]
_RULES: tuple[_Rule, ...] = (
    (_SWITCHES, lambda value: isinstance(value, bool), "neither true nor false"),
    (
        _ACTIVATIONS,
        lambda value: _among([value], ACTIVATIONS),
        "which is no activation function of transformers (silu, gelu, gelu_pytorch_tanh, ...)",
    ),
    (
        ("dtype", "torch_dtype"),
        lambda value: _among([value], DTYPES),
        "which is no type of weights of torch (bfloat16, float16, float32, ...)",
    ),
    (_POINT, lambda value: _has_point(value), "not a number of 0 or more with a point like 1e-05"),
    (_NUMBERS, is_number, "not a number"),
    (_SHARES, lambda value: is_number(value) and 0 <= value <= 1, "not a number from 0 to 1"),
    (_POSITIVE, lambda value: is_whole(value) and value > 0, "not a positive whole number"),
    (_COUNTS, lambda value: is_whole(value) and value >= 0, "not a whole number of 0 or more"),
    (_IDS, is_whole, "not a token id"),
    (
        ("sliding_window_pattern",),
        lambda value: is_whole(value) or isinstance(value, str),
        "neither a whole number nor a pattern",
    ),
    (
        ("use_bidirectional_attention",),
        lambda value: value is False or value == "vision",
        "and a causal LM attends in one direction",
    ),
)
# Of single types, where they are stricter.
_RULES_OF: dict[str, tuple[_Rule, ...]] = {
    "cwm": ((("sliding_window",), bool, "not a positive whole number"),),
    "hyperclovax": ((("attention_multiplier",), lambda value: _has_point(value), "not like 1.0"),),
}
