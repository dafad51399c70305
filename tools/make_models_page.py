"""docs/models.md, made of the table of architectures and of transformers' own list.

    python tools/make_models_page.py

A test compares the page with what this writes.
"""

from __future__ import annotations

from pathlib import Path

from posttrain_dist.models.architectures.known import LEARNED_POSITIONS, REFUSED, TRAINED, Reason

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
TESTS = "tests/models/test_architectures.py"

INTRODUCTION = f"""\
# Models

Which causal LMs of transformers are trained, by the `model_type` of their config.json. This page is
made by `python tools/make_models_page.py` from `posttrain_dist/models/architectures/known.py`.

Training packs samples into one row without padding, and promises that each sample has the loss and
the gradients that it has alone. An architecture is trained where that is so, to rounding:
`{TESTS}` builds a small random model of every line below. A few run by default, all by
`python -m pytest -m slow {TESTS}`.

- **What is refused** is refused by config.json alone, before data is prepared or a run folder made.
- **A type that is in neither table** is tried if transformers has it. Before the first step the
  losses of a packed row of two samples (64 tokens each at most, so that no longer window is seen)
  are compared with the model's own logits, and those with the logits of each sample alone under
  transformers' own attention; what differs or dies there ends the run by the architecture's name.
- **Code in a model folder** (`auto_map` in config.json) is never run. It does no harm where
  transformers has the `model_type` itself; otherwise the folder is refused.
- **Quantised weights, mixtures of experts and multimodal models** are refused whatever their type.
- **Rows have a longest length** where positions are learned (below), and with the RoPE types
  `dynamic` (`max_position_embeddings`) and `longrope` (`original_max_position_embeddings`), which
  above it change with the longest sample of a pack. A larger `data.max_length` is refused.
- A tokenizer needs an end token, and no pad token.
"""
HOW = {
    Reason.experts: "the model built has experts",
    Reason.bidirectional: "a token's logits change with those after it",
    Reason.seq2seq: "its config is that of an encoder-decoder",
}
OTHERWISE = "built and forced through, it dies or its losses are others"


def page(class_names: dict[str, str]) -> str:
    """The page; `class_names` of transformers by model type, other types are left out."""
    head = "| architecture | `model_type` |"
    how = "loss and gradients, packed and alone"
    trained = [
        f"| {class_names[name]} | `{name}` | {_limit(name)} | {how} |"
        for name in sorted(TRAINED)
        if name in class_names
    ]
    refused = [
        f"| {class_names[name]} | `{name}` | {reason} | {HOW.get(reason, OTHERWISE)} |"
        for reason in Reason
        for name in sorted(REFUSED)
        if REFUSED[name] is reason and name in class_names
    ]
    parts = [
        INTRODUCTION,
        "## Trained\n",
        f"{head} longest row | how it is checked |\n|---|---|---|---|",
        *trained,
        "\n## Refused\n",
        f"{head} why | how it is checked |\n|---|---|---|---|",
        *refused,
    ]
    return "\n".join(parts) + "\n"


def _limit(model_type: str) -> str:
    key = LEARNED_POSITIONS.get(model_type)
    return f"`{key}`" if key else ""


def class_names() -> dict[str, str]:
    """Model type -> class of transformers, of all its causal LMs."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


if __name__ == "__main__":
    PAGE.write_text(page(class_names()), encoding="utf-8")
