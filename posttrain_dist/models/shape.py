"""The sizes of a model, read from its config.json in one place. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_dist.errors import ModelError

# What a size is called beside its usual name, in GPT-2 and older models.
_ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
}
# What an architecture takes for a key that its config.json leaves out, where the general rule
# (a key and value head for each query head, heads of hidden_size / heads, untied) is another.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
    },
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.0625},
    "gpt2": {"tie_word_embeddings": True, "attn_pdrop": 0.1},
    "gpt_bigcode": {"tie_word_embeddings": True, "attn_pdrop": 0.1},
    "biogpt": {"tie_word_embeddings": True, "attention_probs_dropout_prob": 0.1},
    "minicpm3": {"dim_model_base": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
    "youtu": {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
}
_FOUR_NORMS = {"gemma2", "gemma3_text"}  # of a layer; others have two
_HEAD_NORMS = {"qwen3", "gemma3_text"}  # of queries and keys
_EVERY_NTH_FULL = {"gemma2": 2, "gemma3_text": 6}  # the others attend to a window
_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a dense causal LM, in elements.

    logits = cap(logit_scale · (hidden Wᵀ + b)), with cap(x) = softcap · tanh(x / softcap).
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int  # of queries
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of the MLP
    vocab_size: int
    tied: bool  # the head's weight is the embedding
    window_L: tuple[int | None, ...]  # tokens that a token of each layer attends to; None: all
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None
    attention_softcap: float | None = None  # of the attention logits
    attention_dropout: float = 0.0
    widest_head: int  # of the queries of any layer
    value_head_dim: int  # of that layer; the kernels for packed rows want it to be the same

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
        """Read the sizes from what config.json holds, or from a transformers config's `to_dict()`.

        Gemma 2 caps its logits (`final_logit_softcapping`), Cohere multiplies them
        (`logit_scale`), as does HyperCLOVA X by what Granite divides them by (`logits_scaling`);
        MiniCPM 3 divides them by hidden_size / dim_model_base.

        Raises:
            ModelError: a size is missing.
        """
        model_type = str(config.get("model_type"))
        values = {**_DEFAULTS.get(model_type, {}), **config}
        hidden_size = _size(values, "hidden_size", where)
        num_layers = _size(values, "num_hidden_layers", where)
        num_heads = _size(values, "num_attention_heads", where)
        bias = bool(values.get("attention_bias"))
        head_dim = values.get("head_dim") or hidden_size // num_heads
        widest_head, value_head_dim = _widest_head(values, head_dim, hidden_size // num_heads)
        return cls(
            model_type=model_type,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=values.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            intermediate_size=_size(values, "intermediate_size", where, 4 * hidden_size),
            vocab_size=_size(values, "vocab_size", where),
            tied=bool(values.get("tie_word_embeddings", False)),
            window_L=_windows(values, model_type, num_layers),
            qkv_bias=bias or model_type == "qwen2",
            output_bias=bias,
            mlp_bias=bool(values.get("mlp_bias")),
            logit_scale=_logit_scale(values, model_type, hidden_size),
            softcap=values.get("final_logit_softcapping"),
            attention_softcap=values.get("attn_logit_softcapping"),
            attention_dropout=max(float(values.get(key) or 0.0) for key in _DROPOUT),
            widest_head=widest_head,
            value_head_dim=value_head_dim,
        )

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, built as Llama's, Mistral's, Qwen's or Gemma's are."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        matrices = self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size)
        biases = self.qkv_bias * (queries + 2 * keys) + self.output_bias * self.hidden_size
        biases += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        norms = (4 if self.model_type in _FOUR_NORMS else 2) * self.hidden_size
        norms += 2 * self.head_dim * (self.model_type in _HEAD_NORMS)
        return matrices + biases + norms

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; an untied head has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied head's weight counts once."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return embeddings + self.num_layers * self.layer_parameters + self.hidden_size


def _size(values: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    found = [values[key] for key in (name, *_ALIASES.get(name, ())) if values.get(key) is not None]
    if not found and default is not None:
        return default
    if not found or not isinstance(found[0], int) or found[0] <= 0:
        raise ModelError(
            f"{name} is {found[0]!r}" if found else f"has no {name}",
            where=where,
            fix="use a folder written by transformers' save_pretrained",
        )
    return found[0]


def _logit_scale(values: Mapping[str, Any], model_type: str, hidden_size: int) -> float:
    if model_type == "minicpm3":
        return float(values.get("dim_model_base") or hidden_size) / hidden_size
    scale, scaling = (float(values.get(key) or 1.0) for key in ("logit_scale", "logits_scaling"))
    return scale * scaling if model_type == "hyperclovax" else scale / scaling


def _widest_head(values: Mapping[str, Any], head_dim: int, otherwise: int) -> tuple[int, int]:
    """(width of queries and keys, width of values), in the layer where they are widest."""
    if values.get("qk_nope_head_dim"):  # multi-head latent attention
        width = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
        return width, values.get("v_head_dim") or otherwise
    # Gemma 4: layers that attend to all tokens have wider heads.
    layers = [each for each in (values.get("per_layer_config") or {}).values() if each]
    widths = [head_dim, values.get("global_head_dim"), *(each.get("head_dim") for each in layers)]
    widest = max(width for width in widths if width)
    return widest, widest


def _windows(values: Mapping[str, Any], model_type: str, num_layers: int) -> tuple[int | None, ...]:
    window = values.get("sliding_window")
    if window is None or values.get("use_sliding_window") is False:
        return (None,) * num_layers
    if types := values.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if "use_sliding_window" in values:  # Qwen: the layers above
        first = values.get("max_window_layers") or 0
        return tuple(window if layer >= first else None for layer in range(num_layers))
    nth = values.get("sliding_window_pattern") or _EVERY_NTH_FULL.get(model_type)
    return tuple(window if not nth or (layer + 1) % nth else None for layer in range(num_layers))
