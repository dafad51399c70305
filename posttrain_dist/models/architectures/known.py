"""Architectures by the `model_type` of their config.json: trained, or refused and why.

tools/make_models_page.py makes docs/models.md of this table, and tests/models/test_architectures.py
holds every line of it. A type that is in neither part is tried: see `Policy.check_head`.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why an architecture is refused: the end of a sentence that begins with its name."""

    experts = "is a mixture-of-experts model, not supported yet"
    state = (
        "has layers that carry a state from token to token (recurrence or convolution), over the "
        "borders of the samples in a packed row"
    )
    own_attention = (
        "computes attention by code of its own, not through transformers' attention interface, so "
        "that it cannot be kept inside the samples of a packed row"
    )
    alibi = (
        "adds a bias for the distance of two tokens to its attention (ALiBi), over the borders of "
        "the samples in a packed row"
    )
    mask = (
        "gives its attention a mask that it computes from its values, over the borders of the "
        "samples in a packed row"
    )
    sinks = "gives its attention learned sinks, which the attention over packed rows does not have"
    head = "has layers of its own between its last hidden states and its logits"
    streams = "keeps several streams of hidden states, which the selection of targets does not know"
    cycles = "runs its layers several times, so that none of them is the last one"
    bidirectional = "is built for attention in both directions, not as a causal LM"
    seq2seq = "is the decoder of an encoder-decoder model, not supported"


TRAINED = frozenset(
    {
        *("apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "cwm", "diffllama"),
        *("ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "gemma4_text"),
        *("gemma4_unified_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite"),
        *("helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "jais2"),
        *("llama", "minicpm3", "ministral", "ministral3", "mistral", "nanochat", "nemotron"),
        *("olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3"),
        *("seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "youtu"),
    }
)

_REFUSED: dict[Reason, tuple[str, ...]] = {
    Reason.experts: (
        *("afmoe", "aria_text", "axk1", "axk2", "beam", "cohere2_moe", "dbrx", "deepseek_v2"),
        *("deepseek_v3", "deepseek_v32", "deepseek_v4", "ernie4_5_moe", "exaone_moe"),
        *("flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss"),
        *("granitemoe", "granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4"),
        *("jetmoe", "kolibri1", "laguna", "llama4_text", "longcat_flash", "mellum"),
        *("mimo_v2_flash", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
        *("solar_open", "zaya"),
    ),
    Reason.state: (
        *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba"),
        *("kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h"),
        *("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text"),
        *("recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
    ),
    Reason.own_attention: (
        *("codegen", "cpmant", "ctrl", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj"),
        *("openai-gpt", "xglm", "xlnet"),
    ),
    Reason.alibi: ("bloom", "mpt"),
    Reason.mask: ("doge",),
    Reason.sinks: ("granite_swa",),
    Reason.head: ("modernbert-decoder",),
    Reason.streams: ("gemma3n_text",),
    Reason.cycles: ("hrm_text",),
    Reason.bidirectional: (
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
        *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roformer"),
        *("xlm", "xlm-roberta", "xlm-roberta-xl"),
    ),
    Reason.seq2seq: (
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"),
        *("pegasus", "plbart", "prophetnet"),
    ),
}
REFUSED = {model_type: reason for reason, types in _REFUSED.items() for model_type in types}

# Layers that do not hand the row's keywords to their attention, and backbones that give their
# output the shape of their input.
DROPS_KEYWORDS = frozenset({"nemotron", "stablelm"})
KEEPS_ROWS = frozenset({"gpt2", "gpt_bigcode"})
# Positions that are learned, one vector each: the key that says how many there are.
LEARNED_POSITIONS = {
    "biogpt": "max_position_embeddings",
    "gpt2": "n_positions",
    "gpt_bigcode": "n_positions",
    "opt": "max_position_embeddings",
}
