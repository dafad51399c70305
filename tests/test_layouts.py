"""The same run in every layout: micro-batches, ranks, engines. Float32, five steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.engine import AdamW, DeepSpeed, Single
from posttrain_dist.files import read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train

STEPS = 5
ZERO = {f"zero{stage}": DeepSpeed(stage=stage, persistence_threshold=0) for stage in range(4)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


# By default every stage and every number of ranks, under `slow` all their pairs.
DEFAULT = ["single-4", "single-1", "zero2-1", "zero0-2", "zero1-2", "zero3-2", "zero2-3", "zero3-3"]
SLOW = [n for w in (1, 2, 3) for s in range(4) if (n := f"zero{s}-{w}") not in DEFAULT]
each_layout = pytest.mark.parametrize(
    "name", [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)


@pytest.fixture(scope="module")
def runs(root, tiny_llama, rows_file, run_workers, request):
    """name of layout -> (rows of metrics.jsonl, exported weights), of those that are tested."""
    tests = [item for item in request.session.items if item.path == request.path]
    tested = {item.callspec.params["name"] for item in tests if hasattr(item, "callspec")}
    tested |= {"zero3-3"}
    base = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            # Clipping is on and bites, weight decay too: both must agree between engines.
            optimizer=AdamW(lr=3e-3, clip=0.5, weight_decay=0.1),
            train=TrainConfig(steps=STEPS, batch_size=8, micro_batch_size=8),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    prepare(base, root / "prepared")

    def freeze(name, engine, micro, batch_size=8):
        size = replace(base.train, micro_batch_size=micro, batch_size=batch_size)
        folder = root / name
        folder.mkdir()
        (folder / "prepared").symlink_to(root / "prepared")
        (folder / "config.yaml").write_text(replace(base, engine=engine, train=size).to_yaml())
        return folder

    single = {f"single-{micro}": freeze(f"single-{micro}", Single(), micro) for micro in (8, 4, 1)}
    for folder in single.values():
        train(RunConfig.from_yaml((folder / "config.yaml").read_text()), folder)
    names = list(single)
    for world in (1, 2, 3):
        # One rank 8 packs at once, two ranks 4 x 1, three ranks 1 x 3 with a filler.
        micro = {1: 8, 2: 1, 3: 1}[world]
        group = {n: freeze(n, e, micro) for k, e in ZERO.items() if (n := f"{k}-{world}") in tested}
        if group:
            run_workers("train_runs.py", world, *group.values())
        names += group
    return {
        name: (
            read_rows(root / name / "metrics.jsonl"),
            load_file(root / name / "export" / "model.safetensors"),
        )
        for name in names
    }


def distance(weights, others) -> float:
    assert weights.keys() == others.keys()
    squares = sum(((weights[n] - others[n]).double() ** 2).sum() for n in weights)
    return float((squares / sum((w.double() ** 2).sum() for w in weights.values())).sqrt())


@each_layout
def test_losses_equal_the_single_process(runs, name):
    reference, others = runs["single-8"][0], runs[name][0]
    assert [row["step"] for row in others] == list(range(STEPS + 1))
    for row, other in zip(reference, others, strict=True):
        for key in row:
            if "loss" in key or "share" in key:
                assert other[key] == pytest.approx(row[key], rel=1e-6), (row["step"], key)
        if row["step"]:
            assert other["train/grad_norm"] == pytest.approx(row["train/grad_norm"], rel=1e-5)
            assert other["train/lr"] == row["train/lr"]


@each_layout
def test_weights_equal_the_single_process(runs, tiny_llama, name):
    reference = runs["single-8"][1]
    assert distance(reference, runs[name][1]) <= 1e-5
    # Training moved the weights a thousand times further than that.
    assert distance(reference, load_file(tiny_llama / "model.safetensors")) > 1e-2


def test_the_loss_falls_and_the_channels_add_up(runs):
    rows = runs["single-8"][0]
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"] - 0.1
    for row in rows[1:]:
        shares = {k.split("/")[1]: v for k, v in row.items() if k.startswith("channel_share/")}
        assert shares.keys() == {"copy", "reverse", "upper"}
        total = sum(share * row[f"channel_loss/{name}"] for name, share in shares.items())
        assert total == pytest.approx(row["train/loss"], rel=1e-6)


def test_the_loss_of_a_step_is_the_sum_over_its_samples(runs, root, tiny_llama):
    """Step 1 again, by plain transformers: each sample alone, sum divided by tokens."""
    import transformers

    step, samples = (root / "zero3-3" / "samples.log").read_text().splitlines()[0].split("\t")
    assert step == "1"
    examples = Examples.open(root / "prepared", "train")
    by_id = {examples[i].sample_id: examples[i] for i in range(len(examples))}
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    total = weight = 0.0
    for sample in samples.split():
        example = by_id[int(sample)]
        ids = torch.from_numpy(example.input_ids_L.astype("int64"))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        mask = torch.from_numpy(example.weight_L[1:].copy())
        total, weight = total + float((nll * mask).sum()), weight + float(mask.sum())
    assert runs["zero3-3"][0][1]["train/loss"] == pytest.approx(total / weight, rel=1e-6)


def test_every_layout_saw_the_same_samples(runs, root):
    logs = {(root / name / "samples.log").read_text() for name in runs}
    assert len(logs) == 1
