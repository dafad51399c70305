"""NaN and infinity in the weights of a model folder: refused by tensor and file, wherever used."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.engine import DeepSpeed
from posttrain_dist.errors import ModelError
from posttrain_dist.generation.local import LocalGenerator
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.models.finite import refuse_nonfinite
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train

NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def config(rows_file, tmp_path, builders):
    """Of a run whose model is a folder of its own."""
    return complete(
        RunConfig(
            model=ModelConfig(path=str(builders.model(tmp_path / "model"))),
            data=DataConfig(train=str(rows_file), max_length=64),
            train=TrainConfig(steps=1, batch_size=2),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )


def spoil(folder, **values):
    """Set one number of each named tensor."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, value in values.items():
        weights[name].view(-1)[-1] = value
    save_file(weights, file, metadata={"format": "pt"})


def test_training_and_answering_name_the_tensors_and_the_file(config, tmp_path):
    folder = tmp_path / "model"
    # The last row of the embeddings is a token that no row of the data has.
    spoil(folder, **{NORM: float("inf"), EMBEDDING: float("nan")})
    prepare(config, tmp_path / "run" / "prepared")
    for use in (lambda: train(config, tmp_path / "run"), lambda: LocalGenerator.load(folder)):
        with pytest.raises(ModelError) as caught:
            use()
        assert caught.value.where == str(folder / "model.safetensors")
        assert f"2 of its 21 tensors hold NaN or infinity: {EMBEDDING}, {NORM}" in str(caught.value)
    spoil(folder, **{NORM: 1.0, EMBEDDING: torch.finfo(torch.float32).max})  # large, and a number
    LocalGenerator.load(folder)


def test_the_shard_is_named(config, tmp_path):
    folder = tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.get_parameter(NORM).data[0] = float("-inf")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][NORM]
    with pytest.raises(ModelError, match=f"{shard}: 1 of its 21 tensors hold .*: {NORM}"):
        refuse_nonfinite(model, folder)


def test_ranks_that_hold_a_part_each_agree(config, tmp_path, run_workers):
    """Under ZeRO-3 one of them alone has the number that is none."""
    spoil(tmp_path / "model", **{"lm_head.weight": float("nan")})
    config = replace(config, engine=DeepSpeed(stage=3, persistence_threshold=0))
    run = tmp_path / "run"
    prepare(config, run / "prepared")
    (run / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(AssertionError) as caught:
        run_workers("train_runs.py", 2, run)
    said = "ModelError: .*model.safetensors: 1 of its 21 tensors hold NaN or infinity: lm_head"
    assert len(re.findall(said, str(caught.value))) == 2


def test_what_fills_up_the_parts_of_three_ranks_is_no_number_of_the_model(
    config, tmp_path, run_workers
):
    """ZeRO-3 cuts 512 numbers into three times 171, and writes nothing to the last one."""
    engine = DeepSpeed(stage=3, persistence_threshold=0)
    config = replace(config, engine=engine, train=replace(config.train, steps=3))
    run = tmp_path / "run"
    prepare(config, run / "prepared")
    (run / "config.yaml").write_text(config.to_yaml())
    run_workers("train_on_garbage.py", 3, run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    norms = [row["train/grad_norm"] for row in rows if "train/grad_norm" in row]
    assert len(norms) == 3 and all(map(math.isfinite, norms))
