"""Rows whose samples begin alike: stored once or in each, they train on the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from targets import targets

from posttrain_dist.config import RunConfig, complete
from posttrain_dist.data import DataConfig, Form, Template
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.flow import By, Extra
from posttrain_dist.models import ModelConfig
from posttrain_dist.objectives.sft import Sft
from posttrain_dist.prepare import prepare

# Thoughts of all turns but the last are left out, so that each turn has a beginning of its own.
FORGETS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else m.content[:9] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def conversation(seed: int, turns: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    messages = []
    for turn in range(turns):
        words = " ".join(f"word{i}" for i in draw.integers(0, 99, 4))
        said = " ".join(f"answer{i}" for i in draw.integers(0, 99, 3))
        messages += [
            {"role": "user", "content": f"{turn} {words}"},
            {"role": "assistant", "content": said},
        ]
    return {"messages": messages, "task_type": "t"}


@pytest.fixture
def opened(tiny_llama: Path, builders: Any, tmp_path: Path) -> Any:
    """Prepare rows in two ways; their training samples."""
    (tmp_path / "forgets.jinja").write_text(FORGETS)

    def build(rows: list[dict[str, Any]], objective: Any, max_length: int, **template: Any) -> Any:
        file = builders.write(tmp_path / "rows.jsonl", rows)
        found = []
        for share in (True, False):
            config = RunConfig(
                model=ModelConfig(path=str(tiny_llama)),
                template=Template(name=str(tmp_path / "forgets.jinja"), **template),
                data=DataConfig(
                    train=str(file), eval_fraction=0, max_length=max_length, share_prompt=share
                ),
            )
            folder = tmp_path / f"prepared-{share}-{max_length}"
            prepare(replace(complete(config), objective=objective), folder)
            found.append(Examples.open(folder, "train"))
        return found

    return build


@pytest.mark.parametrize("max_length", [256, 200])
def test_turns_of_a_conversation_share_what_stands_before_them(
    opened: Any, max_length: int
) -> None:
    rows = [conversation(seed, 4) for seed in range(5)]
    shared, repeated = opened(rows, Sft(), max_length, form=Form.turns)
    found, expected = (list(map(each.__getitem__, range(len(each)))) for each in (shared, repeated))
    assert len(expected) == 5 * 4 and not any(each.parent is not None for each in expected)
    assert targets(found) == targets(expected)
    assert int(shared.supervised.sum()) == int(repeated.supervised.sum())
    assert int(shared.units.lengths.max()) <= max_length
    tokens = int(shared.lengths.sum()) / int(repeated.lengths.sum())
    # Of a conversation that does not fit into a pack, the beginning is repeated once.
    assert (len(shared.units), tokens < 0.55) == ((5, True) if max_length == 256 else (10, False))
    paths = [shared.path(i) for i in range(len(shared))]
    whole = {tuple(each.input_ids_L.tolist()) for each in paths}
    assert {tuple(each.input_ids_L.tolist()) for each in expected} <= whole


class Compared(Sft):
    rows = "pairs"
    extra = (Extra("role_S", index=True, by=By.data), Extra("value_S", by=By.data))


def test_the_prompt_of_a_pair_stands_once_or_before_each_answer(opened: Any) -> None:
    rows = []
    for seed in range(6):
        prompt, chosen = conversation(seed, 1)["messages"]
        rejected = conversation(seed + 100, 1)["messages"][1]
        rows.append(
            {"prompt": [prompt], "chosen": [chosen], "rejected": [rejected], "task_type": "t"}
        )
    shared, repeated = opened(rows, Compared(), 128)
    found, expected = (list(map(each.__getitem__, range(len(each)))) for each in (shared, repeated))
    assert [each.parent is None for each in found] == [True, False, False] * 6
    assert [each.extra["value_S"] for each in expected] == [1.0, 0.0] * 6
    assert targets(found) == targets(expected)
    assert len(shared.units) == len(repeated.units) == 6
    prompts = shared.lengths[::3]
    assert (repeated.units.lengths == shared.units.lengths + prompts).all()
    # A limit that the pair passes with its prompt stated once alone.
    limit = int(shared.units.lengths.max())
    assert limit < int(repeated.units.lengths.max())
    whole, cut = opened(rows, Compared(), limit, strict=False)
    assert int(whole.lengths.sum()) == int(shared.lengths.sum())
    assert int(cut.units.lengths.max()) == limit and len(cut.units) == 6
