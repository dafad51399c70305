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
from posttrain_dist.loop import fit
from posttrain_dist.metrics.channels import ChannelMeter
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.objectives.preference.kto import Kto
from posttrain_dist.objectives.preference.loss_types import Divergence, LossType
from posttrain_dist.objectives.preference.orpo import Orpo
from posttrain_dist.objectives.preference.simpo import Simpo

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


TAKES_MARGIN = ("sigmoid", "hinge", "robust", "sigmoid_norm", "smoothed", "sft", "simpo", "js")
OBJECTIVES = {
    "sigmoid": Dpo(beta=0.3),
    "smoothed": Dpo(beta=0.3, label_smoothing=0.2),
    "hinge": Dpo(beta=0.01, loss_type=LossType.hinge),
    "ipo": Dpo(beta=0.4, loss_type=LossType.ipo),
    "robust": Dpo(beta=0.3, loss_type=LossType.robust, label_smoothing=0.2),
    "sigmoid_norm": Dpo(beta=2.0, loss_type=LossType.sigmoid_norm),
    "exo_pair": Dpo(beta=0.1, loss_type=LossType.exo_pair, label_smoothing=0.05),
    "sppo_hard": Dpo(beta=0.3, loss_type=LossType.sppo_hard),
    "apo_zero": Dpo(beta=0.1, loss_type=LossType.apo_zero),
    "apo_down": Dpo(beta=0.1, loss_type=LossType.apo_down),
    "forward_kl": Dpo(beta=0.01, f_divergence=Divergence.forward_kl),
    "js": Dpo(beta=0.3, f_divergence=Divergence.js),
    "alpha": Dpo(beta=0.3, f_divergence=Divergence.alpha, alpha=0.2),
    "sft": Dpo(beta=0.3, sft_weight=0.5),
    "sum": Dpo(beta=0.3, losses={"sigmoid": 0.5, "ipo": 2.0}),
    "orpo": Orpo(beta=0.2),
    "simpo": Simpo(beta=2.0, gamma=0.5),
    "kto": Kto(beta=0.05, undesirable_weight=1.5),
}


def units_for(name: str) -> list[Unit]:
    """A step for the objective of this name: ties, a ranking and a margin among them."""
    if name == "kto":
        kinds = [GOOD, BAD, BAD, GOOD, BAD]
    else:
        margin = PAIR_WITH_MARGIN if name in TAKES_MARGIN else PAIR
        kinds = [PAIR, RANKING, margin, TIED, PAIR]
    return [unit(i, kind, channel=i % 2) for i, kind in enumerate(kinds, 1)]


class Cut:
    """A source of one step: this rank's micro-batches of `units`."""

    prefetchable = True

    def __init__(
        self, units: Sequence[Unit], objective: Any, rank: int = 0, world: int = 1
    ) -> None:
        self._batches = cut(units, world, 2, objective)[rank]

    def step(self, k: int) -> list[Batch]:
        return self._batches

    def sample_ids(self, k: int) -> list[int]:
        return []


def first_steps(
    engine: Any, names: Iterable[str], rank: int = 0, world: int = 1
) -> dict[str, tuple[float, float]]:
    """Loss and norm of the gradient of each objective, from one engine whose weights stay."""
    found = {}
    for name in names:
        objective = OBJECTIVES[name]
        meter = ChannelMeter(["a", "b"], objective, engine.device)
        infos = fit(
            engine=engine,
            source=Cut(units_for(name), objective, rank, world),
            objective=objective,
            meter=meter,
            describe=meter.train_metrics,
            learning_rate=lambda step: 0.0,
            steps=1,
        )
        metrics = [info.metrics for info in infos][-1]
        found[name] = (metrics["train/loss"], metrics["train/grad_norm"])
    return found


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
