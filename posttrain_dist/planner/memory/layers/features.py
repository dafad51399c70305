"""What the layers of an architecture compute beside their linear layers: by its model_type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from posttrain_dist.planner.job import Job, shared_by

RMS, RMS_PLUS_ONE, RMS_LATE = "rms", "rms plus one", "rms late"
LAYER, COHERE = "layer", "cohere"


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """One architecture.

    Attributes:
        norm: RMS (Llama's), RMS_PLUS_ONE (Gemma's), RMS_LATE (the weight in float32), LAYER,
            COHERE (a layer norm written out in float32).
        parallel: attention and MLP read the same norm, and are added to the layer's input.
        rotary: share of each head that positions turn; 0: none.
        scales: products of the layer's branches with constants (Granite's).
        embedding_scale: of the embeddings by a constant (Gemma's).
        weightless: its two norms have no weight.
        head_norms: queries and keys have a norm without weight, behind the rotation.
        two_rotations: layers with a window have cosines and sines of their own.
        wide_rotary: the rotation is computed in float32.
        own_angles: each layer makes cosines and sines of its own, neighbours side by side.
        value_norm: values have a norm without weight (Gemma 4).
        keeps_attention: a layer has a variable of its attention's output to its end.
        dropout: branches drop out (attention's own is in the shape).
        embedding_dropout: so do embeddings.
    """

    norm: str = RMS
    parallel: bool = False
    rotary: float = 1.0
    activation: str = "silu"
    scales: int = 0
    embedding_scale: bool = False
    weightless: bool = False
    head_norms: bool = False
    two_rotations: bool = False
    wide_rotary: bool = False
    own_angles: bool = False
    value_norm: bool = False
    keeps_attention: bool = False
    dropout: bool = False
    embedding_dropout: bool = False


_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
_LAYER_NORMS = frozenset(
    {
        *("biogpt", "gpt2", "gpt_bigcode", "gpt_neox", "jais2", "nemotron", "olmo", "opt"),
        *("persimmon", "phi", "stablelm", "starcoder2"),
    }
)
_SHARES = ("partial_rotary_factor", "rotary_pct")
_DROPOUTS = ("resid_pdrop", "residual_dropout", "hidden_dropout", "hidden_dropout_prob", "dropout")
_WIDE_ROTARY = frozenset({"cohere", "cohere2", "ernie4_5", "olmo", "olmo2", "olmo3"})
_PARALLEL = frozenset({"cohere", "cohere2", "phi"})


@shared_by("network")
def features_of(job: Job) -> Features:
    """Of the architecture of a job."""
    config, kind = job.network.config, job.network.shape.model_type
    found = Features(activation=_activation(config, kind), rotary=_rotary(config, kind))
    if kind in _LAYER_NORMS:
        found = replace(found, norm=LAYER)
    elif kind.startswith("gemma") or kind == "vaultgemma":
        norm = RMS_LATE if kind.startswith("gemma4") else RMS_PLUS_ONE
        found = replace(found, norm=norm, embedding_scale=True)
    elif kind in ("cohere", "cohere2"):
        found = replace(found, norm=COHERE)
    elif kind in ("olmo2", "olmo3", "helium", "glm4"):
        found = replace(found, norm=RMS_LATE if kind != "glm4" else RMS)
    if kind in ("granite", "minicpm3", "hyperclovax"):
        found = replace(found, scales=2, embedding_scale=True)
    drops = any(float(config.get(key) or 0.0) > 0 for key in _DROPOUTS)
    return replace(
        found,
        parallel=_parallel(config, kind),
        weightless=kind in ("nanochat", "olmo"),
        head_norms=kind == "nanochat",
        two_rotations=kind.startswith(("gemma3", "gemma4", "olmo3")),
        wide_rotary=kind in _WIDE_ROTARY,
        own_angles=kind in ("ernie4_5", "glm", "glm4", "helium"),
        value_norm=kind.startswith("gemma4"),
        keeps_attention=kind in ("gpt2", "gpt_bigcode"),
        dropout=drops,
        embedding_dropout=drops and kind in ("biogpt", "gpt2", "gpt_bigcode"),
    )


def _activation(config: Mapping[str, Any], kind: str) -> str:
    default = {
        "gpt2": "gelu_new",
        "gpt_bigcode": "gelu_pytorch_tanh",
        "starcoder2": "gelu_pytorch_tanh",
        "nemotron": "relu2",
        "persimmon": "relu2",
        "nanochat": "relu2",
        "arcee": "relu2",
        "jais2": "relu2",
        "opt": "relu",
        "phi": "gelu_new",
        "gpt_neox": "gelu",
        "biogpt": "gelu",
        "apertus": "xielu",
    }.get(kind, "gelu_pytorch_tanh" if "gemma" in kind else "silu")
    return str(next((config[key] for key in _ACTIVATION_KEYS if config.get(key)), default))


def _rotary(config: Mapping[str, Any], kind: str) -> float:
    if kind in ("biogpt", "gpt2", "gpt_bigcode", "opt"):
        return 0.0
    default = {
        **dict.fromkeys(("glm", "glm4", "nemotron", "persimmon", "phi"), 0.5),
        "gpt_neox": 0.25,
        "stablelm": 0.25,
    }.get(kind, 1.0)
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    shares = [values.get(key) for values in (config, given) for key in _SHARES]
    return float(next((share for share in shares if share is not None), default))


def _parallel(config: Mapping[str, Any], kind: str) -> bool:
    if kind in ("gpt_neox", "stablelm"):
        return bool(config.get("use_parallel_residual", kind == "gpt_neox"))
    return kind in _PARALLEL
