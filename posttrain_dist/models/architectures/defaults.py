"""What an architecture takes for a key that its config.json leaves out. Imports no torch.

Only where the general rule is another: as many heads of keys as of queries, heads of hidden_size /
num_attention_heads, an untied head, no biases, all tokens attended to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a key is called beside its usual name.
_ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions",),
    "attention_bias": ("qkv_bias",),  # InternLM 3
    "mlp_bias": ("bias",),
}
_TIED = {"tie_word_embeddings": True}
_WIDE_HEADS = {**_TIED, "num_key_value_heads": 4, "head_dim": 256}
_CAPPED = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
_GEMMA4 = {**_WIDE_HEADS, "sliding_window_pattern": 6}
_QWEN = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GPT2 = {**_TIED, "attn_pdrop": 0.1, "max_position_embeddings": 1024}

DEFAULTS: dict[str, dict[str, Any]] = {
    "apertus": {"hidden_act": "xielu"},
    "biogpt": {
        **_TIED,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 1024,
    },
    "bitnet": {"num_key_value_heads": 5},
    "cohere": {**_TIED, "logit_scale": 0.0625},
    "cohere2": {
        **_TIED,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    "cwm": {"num_key_value_heads": 8, "head_dim": 128, "sliding_window": 8192},
    "ernie4_5": {**_TIED, "num_key_value_heads": 2, "head_dim": 128},
    "exaone4": {"num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4},
    "gemma": {**_TIED, "num_key_value_heads": 16, "head_dim": 256},
    "gemma2": {**_WIDE_HEADS, **_CAPPED, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3_text": {**_WIDE_HEADS, "sliding_window": 4096, "sliding_window_pattern": 6},
    "gemma4_text": {
        **_GEMMA4,
        "sliding_window": 512,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
    },
    "gemma4_unified_text": {**_GEMMA4, "sliding_window": 1024},
    "glm": {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    "glm4": {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    "gpt2": _GPT2,
    "gpt_bigcode": {**_GPT2, "multi_query": True},
    "gpt_neox": {"attention_bias": True},
    "helium": {"num_key_value_heads": 20, "head_dim": 128},
    "hyperclovax": {"use_post_norm": True},
    "internlm3": {"num_key_value_heads": 2, "head_dim": 128},
    "iquestcoder": {"num_key_value_heads": 8, "head_dim": 128},
    "jais2": {"attention_bias": True, "mlp_bias": True},
    "minicpm3": {
        **_TIED,
        "num_key_value_heads": 40,
        "dim_model_base": 256,
        "q_lora_rank": 768,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
    },
    "ministral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "ministral3": {"num_key_value_heads": 8, "head_dim": 128},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "nanochat": {"final_logit_softcapping": 15.0},
    "olmo3": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "opt": {
        **_TIED,
        "max_position_embeddings": 2048,
        "enable_bias": True,
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
    },
    "persimmon": {"qk_layernorm": True},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "seed_oss": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_dropout": 0.1,
    },
    "smollm3": {**_TIED, "num_key_value_heads": 4, "use_sliding_window": False},
    "stablelm": {"num_key_value_heads": 32},
    "starcoder2": {**_TIED, "num_key_value_heads": 2, "use_bias": True},
    "vaultgemma": {**_WIDE_HEADS, **_CAPPED, "sliding_window": 4096, "sliding_window_pattern": 2},
    "youtu": {
        **_TIED,
        "num_key_value_heads": 16,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json under the usual names, with what its architecture takes for what it omits."""
    values = {**DEFAULTS.get(str(config.get("model_type")), {}), **config}
    for name, others in _ALIASES.items():
        found = [config[key] for key in (name, *others) if config.get(key) is not None]
        if found:
            values[name] = found[0]
    return values
