"""Hugging Face causal LMs as a Policy: load, attention over packed rows, the head."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from posttrain_dist.errors import Rule, at_least

__all__ = ["Attention", "Checkpointing", "ModelConfig", "Weights"]


class Attention(Enum):
    """How attention inside each sample of a packed row is computed."""

    auto = "auto"  # the fastest that is exact for this model, on this device
    varlen = "varlen"  # torch's kernel for packed rows: CUDA, half precision
    sdpa = "sdpa"  # torch's scaled_dot_product_attention, sample by sample
    eager = "eager"  # plain matmul and softmax: the reference


class Checkpointing(Enum):
    """Which decoder layers drop their activations and compute them again in backward."""

    none = "none"  # fastest
    full = "full"  # all: least memory, a third more work
    selective = "selective"  # the first `checkpoint_layers`


class Weights(Enum):
    """Where the weights come from."""

    load = "load"  # from the folder's safetensors
    random = "random"  # fresh, from config.json and the seed: for pretraining


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The model to train."""

    # A Hugging Face folder; `tiny_base` is the small base model that comes with the package, and
    # `shape:llama3-70b` the sizes of a well-known one, which are planned and not trained. On the
    # command line `run:NAME` is the export of the newest finished run of that name.
    path: str = "tiny_base"
    attention: Attention = Attention.auto
    weights: Weights = Weights.load
    activation_checkpointing: Checkpointing = Checkpointing.none
    checkpoint_layers: int | None = None  # how many layers, of `selective`
    # What such a layer keeps, its input, waits in host memory: long rows fit, a step is slower.
    checkpoint_offload: bool = False
    # Tokens that the tokenizer gets, with the mean of all embeddings at first.
    add_tokens: list[str] = field(default_factory=list)
    compile: bool = False  # torch.compile of norms and MLPs; needs a C++ compiler


def model_rules(model: ModelConfig) -> list[Rule]:
    """What must hold among the values of the group `model`."""
    selective = model.activation_checkpointing is Checkpointing.selective
    key = "model.checkpoint_layers"
    return [
        Rule(
            not selective or model.checkpoint_layers is not None,
            key,
            "is null, and model.activation_checkpointing is selective",
            "set how many layers recompute their activations",
        ),
        Rule(
            selective or model.checkpoint_layers is None,
            key,
            f"is {model.checkpoint_layers}, and model.activation_checkpointing is "
            f"{model.activation_checkpointing.name}",
            "set model.activation_checkpointing=selective",
        ),
        at_least(key, model.checkpoint_layers),
        Rule(
            not (model.checkpoint_offload and model.activation_checkpointing is Checkpointing.none),
            "model.checkpoint_offload",
            "is on, and model.activation_checkpointing is none, so that nothing is kept to offload",
            "set model.activation_checkpointing=full",
        ),
        Rule(
            all(model.add_tokens) and len(set(model.add_tokens)) == len(model.add_tokens),
            "model.add_tokens",
            f"is {model.add_tokens}: a token is empty, or stands there twice",
            "name each new token once, for instance '[<tool>,</tool>]'",
        ),
    ]
