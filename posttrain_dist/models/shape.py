"""The sizes of a model, read from its config.json in one place. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_dist.errors import ModelError
from posttrain_dist.models.architectures.defaults import completed
from posttrain_dist.models.architectures.known import TRAINED

# Whose heads are hidden_size / num_attention_heads wide, and whose queries share no keys, whatever
# config.json says.
_FIXED_HEADS = {"biogpt", "gpt2", "gpt_bigcode", "gpt_neox", "opt", "persimmon", "stablelm"}
_UNGROUPED = {"biogpt", "gpt2", "gpt_neox", "opt", "persimmon"}
_FOUR_TIMES = {"gpt2", "gpt_bigcode"}  # the width of the MLP, where config.json has none
_GEMMA4 = {"gemma4_text", "gemma4_unified_text"}
# Who reads `sliding_window` at all; others may have the key, and attend to every token.
_WINDOWED = {
    *("cohere2", "cwm", "exaone4", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text"),
    *("ministral", "ministral3", "mistral", "olmo3", "phi3", "qwen2", "qwen3", "smollm3"),
    *("starcoder2", "vaultgemma"),
}
_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# No model has so many; a slip of the keyboard would fill the memory.
_LARGEST = {"num_hidden_layers": 10_000}
_LARGEST_SIZE = 2**31 - 1
_SAVED = "use a folder written by transformers' save_pretrained"


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
            ModelError: a size is missing, is none, or contradicts another.
        """
        model_type = str(config.get("model_type"))
        values = completed(config)
        hidden_size = read_size(values, "hidden_size", where)
        num_layers = read_size(values, "num_hidden_layers", where)
        num_heads = read_size(values, "num_attention_heads", where)
        num_kv_heads = _kv_heads(values, model_type, num_heads, where)
        head_dim = _head_dim(values, model_type, hidden_size, num_heads, where)
        # A type that is only tried may have another name for it, and needs it for no tensor.
        known = model_type in TRAINED and model_type not in _FOUR_TIMES
        four_times = None if known else 4 * hidden_size
        widest_head, value_head_dim = _widest_head(values, head_dim, hidden_size // num_heads)
        return cls(
            model_type=model_type,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=read_size(values, "intermediate_size", where, four_times),
            vocab_size=read_size(values, "vocab_size", where),
            tied=bool(values.get("tie_word_embeddings", False)),
            window_L=_windows(values, model_type, num_layers, where),
            logit_scale=_logit_scale(values, model_type, hidden_size),
            softcap=values.get("final_logit_softcapping"),
            attention_softcap=values.get("attn_logit_softcapping"),
            attention_dropout=max(float(values.get(key) or 0.0) for key in _DROPOUT),
            widest_head=widest_head,
            value_head_dim=value_head_dim,
        )

    def keeps_pairs(self, longest: int) -> bool:
        """Whether attention that is no kernel for packed rows may keep something of each pair of
        tokens of a sample, of which the longest has so many.
        """
        windows = any(window is not None and window < longest for window in self.window_L)
        written_out = bool(self.attention_softcap or self.attention_dropout)
        return windows or written_out or self.widest_head != self.value_head_dim


def read_size(values: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    """A size of a config.json: a positive whole number.

    Raises:
        ModelError: it is missing and has no default, or it is none.
    """
    found = values.get(name)
    if found is None and default is not None:
        return default
    if found is None:
        raise ModelError(f"has no {name}", where=where, fix=_SAVED)
    if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
        raise ModelError(
            f"{name} is {found!r}, not a positive whole number", where=where, fix=_SAVED
        )
    if found > (largest := _LARGEST.get(name, _LARGEST_SIZE)):
        raise ModelError(f"{name} is {found:,}, above {largest:,}", where=where, fix=_SAVED)
    return found


def _kv_heads(values: Mapping[str, Any], model_type: str, num_heads: int, where: str) -> int:
    if model_type in _UNGROUPED:
        return num_heads
    if model_type == "gpt_bigcode":
        return 1 if values["multi_query"] else num_heads
    found = read_size(values, "num_key_value_heads", where, num_heads)
    if num_heads % found and model_type in TRAINED and not values.get("qk_nope_head_dim"):
        raise ModelError(
            f"num_attention_heads is {num_heads}, which num_key_value_heads = {found} does not "
            "divide: no query head would know its keys",
            where=where,
            fix=_SAVED,
        )
    return found


def _head_dim(
    values: Mapping[str, Any], model_type: str, hidden_size: int, num_heads: int, where: str
) -> int:
    if values.get("head_dim") is not None and model_type not in _FIXED_HEADS:
        return read_size(values, "head_dim", where)
    if values.get("qk_nope_head_dim"):  # of latent attention: the part with positions
        return read_size(values, "qk_rope_head_dim", where)
    if hidden_size % num_heads and model_type in TRAINED:
        raise ModelError(
            f"hidden_size is {hidden_size}, which num_attention_heads = {num_heads} does not "
            "divide, and there is no head_dim",
            where=where,
            fix=_SAVED,
        )
    return hidden_size // num_heads


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
    widths = [layer["head_dim"] for layer in own_layers(values).values() if layer.get("head_dim")]
    widest = max([head_dim, *widths])
    return widest, widest


def own_layers(values: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """What single layers of Gemma 4 have of their own: those that attend to all tokens.

    Args:
        values: a config.json as `completed` makes it.
    """
    model_type = str(values.get("model_type"))
    given = values.get("per_layer_config")
    if given is not None or model_type not in _GEMMA4:
        return {int(layer): own for layer, own in (given or {}).items() if own}
    own = {"head_dim": values.get("global_head_dim", 512)}
    if values.get("attention_k_eq_v"):
        own["num_key_value_heads"] = values.get("num_global_key_value_heads")
    kinds = _attends_to_all(values, model_type, values["num_hidden_layers"])
    return {layer: own for layer, to_all in enumerate(kinds) if to_all}


def _windows(
    values: Mapping[str, Any], model_type: str, num_layers: int, where: str
) -> tuple[int | None, ...]:
    types = values.get("layer_types")
    if types is not None and len(types) != num_layers:
        raise ModelError(
            f"layer_types has {len(types)} entries, and num_hidden_layers is {num_layers}",
            where=where,
            fix=_SAVED,
        )
    window = values.get("sliding_window")
    ignored = model_type in TRAINED - _WINDOWED
    if ignored or not window or values.get("use_sliding_window") is False:
        return (None,) * num_layers
    window = read_size(values, "sliding_window", where)
    kinds = _attends_to_all(values, model_type, num_layers)
    return tuple(None if to_all else window for to_all in kinds)


def _attends_to_all(values: Mapping[str, Any], model_type: str, num_layers: int) -> list[bool]:
    """Of each layer whether its tokens attend to all before them, where there is a window."""
    layers = range(num_layers)
    nth = values.get("sliding_window_pattern")
    if types := values.get("layer_types"):
        found = [kind != "sliding_attention" for kind in types]
    elif model_type == "cwm":
        found = [layer % 4 == 0 for layer in layers]
    elif model_type == "smollm3":
        rotated = values.get("no_rope_layers")
        nth = values.get("no_rope_layer_interval") or 4
        found = [bool(rotated[i] if rotated else (i + 1) % nth) for i in layers]
    elif "use_sliding_window" in values:  # Qwen: the layers above
        first = values.get("max_window_layers") or 0
        found = [layer < first for layer in layers]
    else:
        found = [isinstance(nth, int) and nth > 0 and (i + 1) % nth == 0 for i in layers]
    return [*found[:-1], True] if model_type in _GEMMA4 else found
