"""Preference rows of random tokens as units of samples, and what plain PyTorch says of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain_dist.data.packs.collate import collate, filler
from posttrain_dist.flow import Batch, Example

Unit = list[Example]
# value, role, margin of each answer of a unit
PAIR, PAIR_WITH_MARGIN = [(1, 0, 0), (0, 0, 0)], [(1, 0, 0.7), (0, 0, 0)]
RANKING, TIED = [(2, 0, 0), (0, 0, 0), (1, 0, 0)], [(1, 0, 0), (1, 0, 0)]
GOOD, BAD = [(1, 0, 0), (0, 1, 0)], [(0, 0, 0), (0, 1, 0)]


def unit(number: int, answers: Sequence[tuple[float, int, float]], channel: int = 0) -> Unit:
    """A prompt and answers to it; log-probabilities of a reference that is nobody's."""
    draw = np.random.default_rng(number)

    def example(i: int, length: int, value: float, role: int, margin: float) -> Example:
        return Example(
            input_ids_L=draw.integers(5, 200, length).astype(np.int32),
            weight_L=np.full(length, float(i > 0), np.float32),
            channel=channel,
            sample_id=100 * number + i,
            extra={
                "role_S": role,
                "value_S": float(value),
                "margin_S": float(margin),
                "ref_logprob_L": -draw.uniform(3.0, 7.0, length).astype(np.float32),
                "old_logprob_L": -draw.uniform(2.0, 6.0, length).astype(np.float32),
            },
            parent=None if i == 0 else 100 * number,
            unit=number,
        )

    prompt = example(0, int(draw.integers(3, 9)), 0, -1, 0)
    lengths = draw.integers(2, 9, len(answers)).tolist()
    described = zip(lengths, answers, strict=True)
    return [prompt, *(example(i, n, *about) for i, (n, about) in enumerate(described, 1))]


def batch_of(units: Iterable[Unit]) -> Batch:
    return collate([example for each in units for example in each])


def cut(units: Sequence[Unit], ranks: int, micro: int, objective: Any) -> list[list[Batch]]:
    """The micro-batches of each rank, with as many on each: `micro` units in one."""
    shares = [units[rank::ranks] for rank in range(ranks)]
    most = -(-max(map(len, shares)) // micro)
    found = []
    for share in shares:
        batches = [batch_of(share[i : i + micro]) for i in range(0, len(share), micro)]
        found.append(batches + [filler(objective) for _ in range(most - len(batches))])
    return found


def counted(batches: Iterable[Batch], objective: Any) -> Any:
    """What the loop sums over micro-batches and ranks before it goes forward."""
    counts = [objective.count(batch) for batch in batches]
    return counts[0]._make(map(sum, zip(*counts, strict=True)))


def swapped(each: Unit) -> Unit:
    """The same answers, each worth the contrary."""
    prompt, *answers = each
    turned = [replace(a, extra={**a.extra, "value_S": -a.extra["value_S"]}) for a in answers]
    return [prompt, *turned]


# ------------------------------------------------------------------------- plain PyTorch, float64


def plain_model(folder: Path) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.double()


def logprob(model: Any, prompt: Example, answer: Example) -> torch.Tensor:
    """log p of each token of one answer behind its prompt, alone in the row."""
    ids = torch.tensor([[*prompt.input_ids_L, *answer.input_ids_L]]).long()
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    each = logits.gather(1, ids[0, 1:, None])[:, 0]
    return each[len(prompt.input_ids_L) - 1 :]


def reference(answer: Example, name: str = "ref_logprob_L") -> torch.Tensor:
    return torch.from_numpy(answer.extra[name]).double()
