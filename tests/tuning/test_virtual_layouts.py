"""What tests/test_tuning_layouts.py has not: starts that run the base model, and ensembles.

Float32, five steps, two ranks beside one process.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from posttrain_dist.checkpoint import CheckpointConfig
from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.engine import AdamW, DeepSpeed, Single
from posttrain_dist.files import read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train
from posttrain_dist.tuning.prefix_tuning import Prefix
from posttrain_dist.tuning.prompt_tuning import Prompt

TEXT = "the quick brown fox"
TUNINGS = {
    "prompt": Prompt(tokens=3, init_text=TEXT),
    "ensemble": Prompt(tokens=3, ensemble=2, init_text=TEXT),
    "prefix": Prefix(tokens=3, init_text=TEXT),
}
STEPS = 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama, rows_file, run_workers, request):
    """(tuning, stage or "single") -> rows of metrics.jsonl, of those that are tested."""
    tests = [item for item in request.session.items if item.path == request.path]
    tested = {(item.callspec.params["name"], item.callspec.params["stage"]) for item in tests}
    root = tmp_path_factory.mktemp("virtual")
    base = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            optimizer=AdamW(lr=3e-2, clip=0.01, weight_decay=0.1),
            train=TrainConfig(steps=STEPS, batch_size=8, micro_batch_size=8),
            checkpoint=CheckpointConfig(export=False),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    prepare(base, root / "prepared")

    def freeze(name, layout, engine, micro):
        folder = root / f"{name}-{layout}"
        folder.mkdir()
        (folder / "prepared").symlink_to(root / "prepared")
        size = replace(base.train, micro_batch_size=micro)
        config = replace(base, engine=engine, train=size, tuning=TUNINGS[name])
        (folder / "config.yaml").write_text(config.to_yaml())
        return folder

    found = {}
    for name in {name for name, _ in tested}:
        folder = freeze(name, "single", Single(), 8)
        train(RunConfig.from_yaml((folder / "config.yaml").read_text()), folder)
        found[name, "single"] = read_rows(folder / "metrics.jsonl")
    for stage in range(4):
        engine = DeepSpeed(stage=stage, persistence_threshold=0)
        names = [name for name in TUNINGS if (name, stage) in tested]
        folders = {name: freeze(name, f"zero{stage}", engine, 1) for name in names}
        if folders:
            run_workers("train_runs.py", 2, *folders.values())
        for name, folder in folders.items():
            found[name, stage] = read_rows(folder / "metrics.jsonl")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNINGS)
@pytest.mark.parametrize("stage", range(4))
def test_losses_and_gradients_equal_the_single_process(runs, name, stage):
    reference, others = runs[name, "single"], runs[name, stage]
    assert [row["step"] for row in others] == list(range(STEPS + 1))
    assert abs(reference[-1]["eval/loss"] - reference[0]["eval/loss"]) > 1e-2  # it moves
    for row, other in zip(reference, others, strict=True):
        for key in row:
            if "loss" in key or "share" in key:
                assert other[key] == pytest.approx(row[key], rel=2e-6), (row["step"], key)
        if row["step"]:
            assert other["train/grad_norm"] == pytest.approx(row["train/grad_norm"], rel=1e-4)
