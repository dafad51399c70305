"""Held-out answers of any model folder, without a run: the share in the right order."""

from __future__ import annotations

import pytest

from posttrain_dist.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.evaluation.heldout import evaluate
from posttrain_dist.objectives.preference.simpo import Simpo
from posttrain_dist.prepare import prepare


def test_the_accuracy_is_that_of_comparisons(tmp_path, tiny_llama, builders):
    """Each pair once more the other way round: one of the two is right, whatever the model."""
    answers = [(f"is it {i}?", f"yes {i}", f"no {i % 7}") for i in range(12)]
    rows = [{"prompt": p, "chosen": a, "rejected": b, "task_type": "there"} for p, a, b in answers]
    rows += [{"prompt": p, "chosen": b, "rejected": a, "task_type": "back"} for p, a, b in answers]
    file = str(builders.write(tmp_path / "pairs.jsonl", rows))
    other = [{"prompt": "say it", "chosen": "it", "rejected": "that"}]
    train = str(builders.write(tmp_path / "train.jsonl", other))
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            objective=Simpo(gamma=0.0),
            data=DataConfig(train=train, eval=file, max_length=64),
            train=TrainConfig(dtype=Dtype.float32),
        )
    )
    prepare(config, tmp_path / "prepared")
    found = evaluate(config, tmp_path / "prepared")
    assert found["accuracy"] == 0.5
    assert found["loss"] > 0.69 and {"there", "back"} <= found["channels"].keys()
    both = found["channels"]["there"] + found["channels"]["back"]
    assert both / 2 == pytest.approx(found["loss"], rel=1e-12)
