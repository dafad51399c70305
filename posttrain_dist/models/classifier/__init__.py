"""Reward models: a backbone with a scalar head, `…ForSequenceClassification` of one label.

Imports no torch.

    is_classifier          whether a folder holds one
    check_kind             ... where it is to, and not where it may not
    classifier_network     what config.json says of one that is made of a causal LM
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain_dist.errors import ModelError

# The module of the scalar head, in transformers, `peft` and vLLM alike.
SCORE = "score"
LM_HEADS = ("lm_head", "embed_out", "output_projection")  # of causal LMs, which it has not
SUFFIX = "ForSequenceClassification"
# Types that are trained, and that transformers has no such class of.
WITHOUT_CLASS = frozenset(
    {
        *("apertus", "bitnet", "cohere", "cohere2", "cwm", "ernie4_5", "gemma4_text"),
        *("gemma4_unified_text", "granite", "hyperclovax", "internlm3", "iquestcoder", "jais2"),
        *("nanochat", "vaultgemma", "youtu"),
    }
)


def is_classifier(network: Mapping[str, Any]) -> bool:
    """Whether config.json is of a sequence classifier."""
    return any(str(name).endswith(SUFFIX) for name in network.get("architectures") or ())


def num_labels(network: Mapping[str, Any]) -> int:
    """Of a classifier, as transformers reads it."""
    labels = network.get("id2label")
    return len(labels) if isinstance(labels, Mapping) else int(network.get("num_labels", 2))


def check_kind(network: Mapping[str, Any], folder: Path, *, scalar: bool) -> None:
    """Refuse a model whose head is not what is trained.

    Args:
        network: config.json of the folder.
        scalar: whether a reward model is to be made.

    Raises:
        ModelError: a reward model is to answer, or this architecture cannot become one.
    """
    where, model_type = str(folder / "config.json"), network.get("model_type")
    if is_classifier(network) and not scalar:
        raise ModelError(
            f"is a reward model ({network['architectures'][0]}): it scores answers and writes none",
            where=where,
            fix="use objective=reward, or the causal LM that it was made of",
        )
    if scalar and model_type in WITHOUT_CLASS:
        raise ModelError(
            f"transformers has no {SUFFIX} of the type {model_type}, so that no folder could hold "
            "the reward model",
            where=where,
            fix="use a type that has one, such as Llama, Qwen3, Mistral or Gemma 2",
        )


def classifier_network(network: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the reward model that is made of `network`.

    "regression" is what transformers and vLLM call an output that no sigmoid or softmax is put on.

    Raises:
        ModelError: transformers has no such class of this type.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES,
    )

    model_type = network.get("model_type")
    if model_type not in NAMES:
        raise ModelError(
            f"transformers has no {SUFFIX} of the type {model_type}",
            where="model.path",
            fix="use a type that has one, such as Llama, Qwen3, Mistral or Gemma 2",
        )
    made = {
        "architectures": [NAMES[model_type]],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",
    }
    return dict(sorted({**network, **made}.items()))
