"""Small configs of the causal LMs of transformers, for the tests of the table of architectures."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SLIDING, FULL = "sliding_attention", "full_attention"
# A size under each of the names that architectures have for it; each takes those that it knows.
SIZE: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("sliding_window", "window_size"), 6),
    "vocab_size": 220,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 0,
    "attention_types": [[["global", "local"], 1]],  # GPT-Neo
    # Multi-head latent attention.
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # Experts, and states.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "first_k_dense_replace": 0,
    **dict.fromkeys(("mamba_n_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "linear_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
}
_FLAT_HEADS = {"num_key_value_heads": 4}
_GEMMA4 = {
    "vocab_size_per_layer_input": 220,
    "hidden_size_per_layer_input": 8,
    "num_experts": None,
}
# What an architecture needs beside its sizes, or what makes a part of it show.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma4_text": {**_GEMMA4, "layer_types": [SLIDING, FULL], "global_head_dim": 16},
    "gemma4_unified_text": {**_GEMMA4, "layer_types": [SLIDING, FULL], "global_head_dim": 16},
    "minicpm3": {**_FLAT_HEADS, "dim_model_base": 8},
    "youtu": _FLAT_HEADS,
    "hyperclovax": {"logits_scaling": 0.5, "attention_multiplier": 0.5},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.5, "residual_multiplier": 0.3},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "nanochat": {"final_logit_softcapping": 3.0},
    **{
        name: {"layer_types": [SLIDING, FULL]}
        for name in ("cohere2", "cwm", "exaone4", "gemma3_text", "ministral", "olmo3")
    },
    **{
        name: {
            "layer_types": [SLIDING, FULL],
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 8,
        }
        for name in ("gemma2", "vaultgemma")
    },
    "lfm2": {"layer_types": ["conv", FULL]},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 220,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "layer_types": [SLIDING, FULL],
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": 48,
    },
    "beam": {"mlp_layer_types": ["sparse", "sparse"]},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": []},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
    **{
        name: {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
        for name in ("zamba", "zamba2")
    },
}
# Other forms of the same architectures, of which a wrong program would compute something else.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    ("gpt_bigcode", {"multi_query": False}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}),
    ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("phi", {"qk_layernorm": True}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
    ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}),
    ("olmo", {"clip_qkv": 0.5}),
    ("starcoder2", {"use_bias": False}),
    ("persimmon", {"qk_layernorm": False}),
    ("diffllama", {"num_hidden_layers": 3}),
    ("ernie4_5", {"use_bias": True}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    (
        "gemma4_text",
        {
            **_GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
]


def small_config(model_type: str, changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The config of a model of `model_type` with some thousand parameters, without dropout."""
    kind = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(kind.__init__).parameters)
    if dataclasses.is_dataclass(kind):
        known |= {field.name for field in dataclasses.fields(kind)}
    known -= set(kind.attribute_map)
    sizes = {name: value for name, value in SIZE.items() if name in known}
    return kind(**sizes | (CHANGES.get(model_type, {}) if changes is None else changes))
