"""The engines on a GPU, in one command: `pytest -m gpu`. Losses are checked on the CPU."""

from __future__ import annotations

import pytest
import torch

from posttrain_dist.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.engine import AdamW, DeepSpeed, Single
from posttrain_dist.files import read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
ENGINES = {"single": Single(), "zero1": DeepSpeed(stage=1), "zero3": DeepSpeed(stage=3)}


def held_out_loss(model, examples) -> float:
    """By plain transformers on the CPU, each sample alone."""
    total = weight = 0.0
    for i in range(len(examples)):
        ids = torch.from_numpy(examples[i].input_ids_L.astype("int64"))
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        mask = torch.from_numpy(examples[i].weight_L[1:].copy())
        total, weight = total + float((nll * mask).sum()), weight + float(mask.sum())
    return total / weight


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_gpu_run_has_the_losses_of_plain_transformers(
    engine, dtype, tmp_path, tiny_llama, rows_file, run_workers
):
    import transformers

    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            optimizer=AdamW(lr=3e-3),
            engine=ENGINES[engine],
            train=TrainConfig(steps=5, batch_size=4, micro_batch_size=2, dtype=dtype),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    folder = tmp_path / "run"
    prepare(config, folder / "prepared")
    (folder / "config.yaml").write_text(config.to_yaml())
    run_workers("train_runs.py", 1, folder)
    rows = read_rows(folder / "metrics.jsonl")
    examples = Examples.open(folder / "prepared", "eval")
    relative = 1e-3 if dtype is Dtype.float32 else 1e-2  # TF32 off; bf16 keeps eight bits
    for row, place in ((rows[0], tiny_llama), (rows[-1], folder / "export")):
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        assert row["eval/loss"] == pytest.approx(held_out_loss(model, examples), rel=relative)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
