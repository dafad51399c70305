"""LoRA on a base in NF4: the same in every layout."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from posttrain_dist.checkpoint import CheckpointConfig
from posttrain_dist.config import (
    DataConfig,
    Lora,
    Quantize,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.engine import AdamW
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.files import read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train

sys.path.insert(0, str(Path(__file__).parents[1] / "workers"))
import train_nf4

CPU = torch.device("cpu")
LAYOUTS = [
    (3, False, "float32"),
    *(
        pytest.param(stage, offload, dtype, marks=pytest.mark.slow)
        for stage in range(4)
        for offload in ((False, True) if stage else (False,))
        for dtype in ("float32", "bfloat16")
        if (stage, offload, dtype) != (3, False, "float32")
    ),
]


@pytest.fixture(scope="module")
def single(nf4_llama):
    """dtype -> what one process makes of the base."""
    found = {}

    def run(dtype):
        if dtype not in found:
            engine = SingleEngine(AdamW(clip=0.5), CPU)
            train_nf4.policy_of(nf4_llama, engine, getattr(torch, dtype))
            start = train_nf4.adapters(engine)
            found[dtype] = (train_nf4.train(engine, 0, 1), start, train_nf4.adapters(engine))
        return found[dtype]

    return run


def distance(tensors, others) -> float:
    assert tensors.keys() == others.keys()
    squares = sum(((tensors[n] - others[n]).double() ** 2).sum() for n in tensors)
    return float((squares / sum((t.double() ** 2).sum() for t in tensors.values())).sqrt())


@pytest.mark.parametrize(("stage", "offload", "dtype"), LAYOUTS)
def test_two_ranks_train_as_one_process(
    nf4_llama, run_workers, single, tmp_path, stage, offload, dtype
):
    expected, start, trained = single(dtype)
    job = json.dumps([stage, offload, dtype, str(tmp_path / "adapters.pt")])
    outputs = run_workers("train_nf4.py", 2, nf4_llama, job)
    told = [json.loads(re.search(r"TOLD (.*)", output).group(1)) for output in outputs]
    tolerance = 1e-6 if dtype == "float32" else 5e-4
    for seen in told:
        for key in ("losses", "evaluated"):
            assert seen[key] == pytest.approx(expected[key], rel=tolerance), key
        assert seen["norms"] == pytest.approx(expected["norms"], rel=max(1e-5, 20 * tolerance))
    adapters = torch.load(tmp_path / "adapters.pt", weights_only=True)
    assert distance(trained, adapters) < (1e-4 if dtype == "float32" else 0.02)
    assert distance(trained, start) > 0.1
    share = told[0]["held"] / told[0]["whole"]
    assert share == pytest.approx(0.5 if stage == 3 else 1.0, rel=0.01)


def trained(root, name, tuning, steps, resume="auto", **options):
    """Rows of metrics.jsonl of a run of the small base model on the embedded data."""
    config = complete(
        RunConfig(
            data=DataConfig(train="embedded", max_length=256),
            tuning=tuning,
            optimizer=AdamW(lr=3e-3),
            train=TrainConfig(steps=steps, batch_size=4, micro_batch_size=4, resume=resume),
            checkpoint=CheckpointConfig(export=False),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    if not (root / "prepared").exists():
        prepare(config, root / "prepared")
    (root / name).mkdir(exist_ok=True)
    if not (root / name / "prepared").exists():
        (root / name / "prepared").symlink_to(root / "prepared")
    train(config, root / name)
    return read_rows(root / name / "metrics.jsonl")


@pytest.mark.slow
def test_the_loss_is_that_of_lora_on_an_unquantised_base(tmp_path):
    rows = {q: trained(tmp_path, q.name, Lora(quantize=q), 100) for q in Quantize}
    plain, nf4 = ([row["eval/loss"] for row in rows[q] if "eval/loss" in row] for q in Quantize)
    print(f"held-out loss at steps 0 and 100: LoRA {plain}, QLoRA {nf4}")
    assert 1e-3 < abs(nf4[0] / plain[0] - 1) < 0.02
    assert abs(nf4[-1] / plain[-1] - 1) < 0.02
    assert plain[-1] < plain[0] - 0.5
