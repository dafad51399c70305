"""Every trained architecture by its `model_type`; names as transformers builds the modules."""

from __future__ import annotations

from dataclasses import replace

from posttrain_dist.models.network.families.family import Family, Heads

_SCALE_AND_SHIFT = ("weight", "bias")
_FOUR_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

_LLAMA = Family(mlp_bias="mlp_bias")
_PLAIN_MLP = Family()
_NO_BIAS = Family(query_bias=False, output_bias=False)
_GEMMA2 = Family(norms=_FOUR_NORMS)
_GEMMA3 = replace(_GEMMA2, head_norms_over=Heads.shared)
_GLM = Family(output_bias=False, mlp_in=("gate_up_proj",))
_GPT2 = Family(
    model="transformer",
    layers="h",
    embedding="wte",
    positions=("wpe", 0),
    final_norm="ln_f",
    attention="attn",
    queries=("c_attn",),
    output="c_proj",
    query_bias=True,
    output_bias=True,
    mlp_in=("c_fc",),
    mlp_out="c_proj",
    mlp_bias=True,
    transposed=True,
    norms=("ln_1", "ln_2"),
    norm_parts=_SCALE_AND_SHIFT,
)
_NEOX = Family(
    model="gpt_neox",
    embedding="embed_in",
    final_norm="final_layer_norm",
    attention="attention",
    queries=("query_key_value",),
    output="dense",
    mlp_in=("dense_h_to_4h",),
    mlp_out="dense_4h_to_h",
    mlp_bias=True,
    norm_parts=_SCALE_AND_SHIFT,
)
_OPT = Family(
    model="model.decoder",
    positions=("embed_positions", 2),
    final_norm="final_layer_norm",
    queries=("k_proj", "v_proj", "q_proj"),
    output="out_proj",
    query_bias="enable_bias",
    output_bias="enable_bias",
    mlp="",
    mlp_in=("fc1",),
    mlp_out="fc2",
    mlp_bias="enable_bias",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    norm_parts=_SCALE_AND_SHIFT,
)
_OLMO2 = Family(
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    head_norms_over=Heads.whole,
)
_ARCEE = replace(_LLAMA, mlp_in=("up_proj",))
_LATENT = Family(latent=True)

FAMILIES: dict[str, Family] = {
    "apertus": Family(
        mlp_in=("up_proj",),
        norms=("attention_layernorm", "feedforward_layernorm"),
        head_norms_over=Heads.shared,
    ),
    "arcee": _ARCEE,
    "biogpt": replace(
        _OPT,
        model="biogpt",
        final_norm="layer_norm",
        head="output_projection",
        query_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    "bitnet": _PLAIN_MLP,
    "cohere": Family(
        norms=("input_layernorm",), head_norms_over=Heads.each, head_norms_if="use_qk_norm"
    ),
    "cohere2": Family(norms=("input_layernorm",)),
    "cwm": replace(_NO_BIAS, mlp_bias="mlp_bias"),
    "diffllama": _PLAIN_MLP,
    "ernie4_5": Family(query_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias"),
    "exaone4": replace(
        _NO_BIAS,
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        head_norms_over=Heads.shared,
    ),
    "gemma": _PLAIN_MLP,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma4_text": _GEMMA3,
    "gemma4_unified_text": _GEMMA3,
    "glm": _GLM,
    "glm4": replace(
        _GLM,
        norms=(
            *("input_layernorm", "post_attention_layernorm"),
            *("post_self_attn_layernorm", "post_mlp_layernorm"),
        ),
    ),
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, transposed=False),
    "gpt_neox": _NEOX,
    "granite": _LLAMA,
    "helium": replace(_LLAMA, output_bias=False),
    "hunyuan_v1_dense": Family(
        head_norms=("query_layernorm", "key_layernorm"), head_norms_over=Heads.shared
    ),
    "hyperclovax": _LLAMA,
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "jais2": replace(_ARCEE, norm_parts=_SCALE_AND_SHIFT),
    "llama": _LLAMA,
    "minicpm3": replace(_LATENT, mlp_bias="mlp_bias"),
    "ministral": _NO_BIAS,
    "ministral3": _NO_BIAS,
    "mistral": _NO_BIAS,
    "nanochat": Family(mlp_in=("fc1",), mlp_out="fc2", norm_parts=()),
    "nemotron": replace(_ARCEE, norm_parts=_SCALE_AND_SHIFT),
    "olmo": replace(_PLAIN_MLP, norm_parts=()),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "opt": _OPT,
    "persimmon": replace(
        _NEOX,
        model="model",
        embedding="embed_tokens",
        final_norm="final_layernorm",
        attention="self_attn",
        query_bias=True,
        output_bias=True,
        head_norms=("q_layernorm", "k_layernorm"),
        head_norms_over=Heads.shared,
        head_norms_if="qk_layernorm",
    ),
    "phi": Family(
        final_norm="final_layernorm",
        head_bias=True,
        output="dense",
        query_bias=True,
        output_bias=True,
        mlp_in=("fc1",),
        mlp_out="fc2",
        mlp_bias=True,
        norms=("input_layernorm",),
        norm_parts=_SCALE_AND_SHIFT,
        head_norms=("q_layernorm", "k_layernorm"),
        head_norms_over=Heads.shared,
        head_norms_if="qk_layernorm",
    ),
    "phi3": replace(_NO_BIAS, queries=("qkv_proj",), mlp_in=("gate_up_proj",)),
    "qwen2": Family(query_bias=True, output_bias=False),
    "qwen3": Family(head_norms_over=Heads.shared),
    "seed_oss": replace(_LLAMA, output_bias="attention_out_bias"),
    "smollm3": _LLAMA,
    "stablelm": Family(query_bias="use_qkv_bias", output_bias=False, norm_parts=_SCALE_AND_SHIFT),
    "starcoder2": Family(
        query_bias="use_bias",
        output_bias="use_bias",
        mlp_in=("c_fc",),
        mlp_out="c_proj",
        mlp_bias="use_bias",
        norm_parts=_SCALE_AND_SHIFT,
    ),
    "vaultgemma": Family(norms=("input_layernorm", "pre_feedforward_layernorm")),
    "youtu": _LATENT,
}
