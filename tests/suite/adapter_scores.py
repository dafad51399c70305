"""Held-out scores of adapters by plain `peft`, each row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain_dist.config import (
    DataConfig,
    Dtype,
    ModelConfig,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.data.prepared.arrays import Examples


def config_of(model: Path, rows: Path, **changes: Any) -> RunConfig:
    return complete(
        RunConfig(
            model=ModelConfig(path=str(model)),
            data=DataConfig(train=str(rows), max_length=96, eval_fraction=0.2),
            train=TrainConfig(steps=1, dtype=Dtype.float32),
            **changes,
        )
    )


def logits_by_peft(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[L, V] of a row alone, behind whatever virtual tokens there are."""
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) :]


def by_peft(wide: Path, prepared: Path, folders: list[Path]) -> dict[str, Any]:
    """Loss and accuracy of the mean of several models' probabilities, row by row."""
    from peft import PeftModel

    models = [AutoModelForCausalLM.from_pretrained(wide).eval() for _ in folders or [None]]
    loaded = [PeftModel.from_pretrained(m, f).eval() for m, f in zip(models, folders, strict=False)]
    sums: dict[str, list[float]] = {}
    votes = [0, 0]
    examples = Examples.open(prepared, "eval")
    for i in range(len(examples)):
        example = examples[i]
        ids = torch.tensor(example.input_ids_L.tolist())
        weight = torch.tensor(example.weight_L.tolist())[1:]
        log_p = torch.stack(
            [logits_by_peft(m, ids)[:-1].log_softmax(-1) for m in (loaded or models)]
        )
        mean = log_p.exp().mean(0)
        nll = -mean[range(len(ids) - 1), ids[1:]].log()
        row = sums.setdefault(list(examples.channels)[example.channel], [0, 0, 0, 0])
        row[0] += float((nll * weight).sum())
        row[1] += float(weight.sum())
        row[2] += float(((mean.argmax(-1) == ids[1:]) & (weight > 0)).sum())
        row[3] += float((weight > 0).sum())
        for place in (weight > 0).nonzero()[:, 0].tolist():
            tops = log_p[:, place].argmax(-1).tolist()
            best = max(set(tops), key=lambda token: (tops.count(token), float(mean[place, token])))
            votes[0] += best == int(ids[1:][place])
            votes[1] += 1
    total = [sum(column) for column in zip(*sums.values(), strict=True)]
    return {
        "loss": total[0] / total[1],
        "accuracy": total[2] / total[3],
        "channels": {channel: row[0] / row[1] for channel, row in sums.items()},
        "vote": votes[0] / votes[1],
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), name
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-9), name
    assert found["channels"] == pytest.approx(expected["channels"], rel=1e-5), name
