"""What training has to know of the tokenizer, so that it loads none."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.prepare.fingerprint import Inputs

_FIRST_SAMPLES = 200  # that show how turns end


def watched_tokens(inputs: Inputs) -> dict[int, str]:
    """The special tokens that have a loss of their own in the metrics: id -> name, ids ascending.

    Those that the chat template in use writes are among them; rows of text have no template.
    """
    from posttrain_dist.metrics.special_tokens import special_tokens  # imports torch

    source = "" if inputs.template is None else inputs.template.source
    return special_tokens(inputs.tokenizer, source)


def end_token(examples: Examples, model_folder: Path) -> int | None:
    """The token that supervised turns end with: the last target of most of the first samples.

    Only an added token of the tokenizer can be one: a line break that a template writes after
    each turn would end every answer at its first line.

    Args:
        examples: the training split.
        model_folder: with tokenizer.json.

    Returns:
        Its id; null where the samples end with none, or there is no sample.
    """
    tokenizer = json.loads((model_folder / "tokenizer.json").read_text(encoding="utf-8"))
    last: Counter[int] = Counter()
    for i in range(min(len(examples), _FIRST_SAMPLES)):
        example = examples[i]
        targets = example.input_ids_L[example.weight_L > 0]
        if len(targets) and not example.truncated:
            last[int(targets[-1])] += 1
    token = last.most_common(1)[0][0] if last else None
    return token if token in {entry["id"] for entry in tokenizer.get("added_tokens", [])} else None
