"""A tuning that saves what it trains: its checkpoints are of no layout, and hold nothing else."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from part_tuning import KEPT, Part
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posttrain_dist.checkpoint import store
from posttrain_dist.checkpoint.manifest import MANIFEST, TRAINED, read_manifest
from posttrain_dist.checkpoint.trained_state import read_kept, step_of_tensors
from posttrain_dist.config import (
    SLOTS,
    DataConfig,
    Full,
    ModelConfig,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.engine import AdamW, DeepSpeed, Single
from posttrain_dist.engine.state_files import step_of_file
from posttrain_dist.errors import CheckpointError
from posttrain_dist.files import digest_of, read_object, read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train

STEPS, SAVED = 6, 3


@pytest.fixture(autouse=True)
def part(monkeypatch):
    monkeypatch.setitem(SLOTS["tuning"], "part", Part)


@pytest.fixture
def base(part, tiny_llama, rows_file):
    return complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            tuning=Part(),
            # Clipping is on and bites, weight decay too: both must agree between engines.
            optimizer=AdamW(clip=0.5, weight_decay=0.1),
            train=TrainConfig(steps=STEPS, batch_size=4, micro_batch_size=2, save_every=SAVED),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )


def zero(stage):
    return DeepSpeed(stage=stage, persistence_threshold=40)


def freeze(folder, config):
    folder.mkdir(parents=True)
    prepare(config, folder / "prepared")
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


def numbers(folder):
    outside = ("time_s", "system/memory_bytes", "train/tokens_per_s")
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in outside} for row in rows]


def lose_the_end(folder):
    (store.folder_of(folder, STEPS) / MANIFEST).unlink()
    (folder / "logs" / "outcome.json").unlink()


def losses(folder):
    return [row["train/loss"] for row in numbers(folder) if row["step"]]


def test_a_checkpoint_holds_what_is_trained_and_a_run_goes_on_from_it(base, tmp_path, tiny_llama):
    config = replace(base, checkpoint=replace(base.checkpoint, export=False))
    folder = freeze(tmp_path / "run", config)
    train(config, folder)
    whole = numbers(folder)
    assert "learning rate 0.003 (of tuning part)" in (folder / "logs" / "rank-0.log").read_text()
    lose_the_end(folder)
    train(config, folder)
    assert numbers(folder) == whole  # bit for bit
    saved = store.folder_of(folder, SAVED)
    assert [path.name for path in (saved / "state").iterdir()] == [TRAINED]
    start = load_file(tiny_llama / "model.safetensors")
    kept = read_kept(saved / "state")
    assert kept.keys() == {name for name in start if Part().kept(name)}
    assert torch.equal(kept[KEPT], start[KEPT])
    assert all(not torch.equal(kept[n], start[n]) for n in kept if n != KEPT)
    with safe_open(saved / "state" / TRAINED, "pt") as file:
        assert file.metadata() == {"step": "3", "format": "pt"}
        assert float(file.get_tensor("model.norm.weight::step")) == 3
        assert len(list(file.keys())) == 4 * len(kept) - 3
    # The matrices learn twice as fast: Adam's first update is its rate.
    again = replace(config, train=replace(config.train, resume="never", steps=1))
    train(again, folder)
    kept = read_kept(store.folder_of(folder, 1) / "state")
    moved = {n: float((kept[n] - start[n]).abs().quantile(0.5)) for n in kept if n != KEPT}
    norms = {value for n, value in moved.items() if "norm" in n}
    query = moved["model.layers.0.self_attn.q_proj.weight"]
    rate = numbers(folder)[-1]["train/lr"]
    assert query == pytest.approx(2 * rate, rel=0.05) and min(norms) > 0


def test_damage_and_other_tunings_are_refused(base, tmp_path):
    config = replace(base, checkpoint=replace(base.checkpoint, export=False))
    folder = freeze(tmp_path / "run", config)
    train(config, folder)
    newest = store.folder_of(folder, STEPS)
    path = newest / "state" / TRAINED

    def write(tensors, **metadata):
        """As a forger does: digests and all."""
        save_file(tensors, path, metadata)
        manifest = replace(read_manifest(store.folder_of(folder, SAVED)), step=STEPS)
        files = {f"state/{TRAINED}": digest_of(path)}
        (newest / MANIFEST).write_text(replace(manifest, files=files).to_json())
        return store.damage_of(newest, step_of_file)

    tensors = load_file(path)
    assert store.damage_of(newest, step_of_file) == ""
    assert "is of step 9, and MANIFEST.json of step 6" in write(tensors, step="9")
    lost = {**tensors, "model.norm.weight": tensors["model.norm.weight"] * float("nan")}
    assert "holds model.norm.weight with values that are not" in write(lost, step="6")
    fewer = {k: v for k, v in tensors.items() if not k.startswith("model.norm.weight")}
    assert write(fewer, step="6") == ""
    said = r"1 of this run are not in it: model\.norm\.weight\n"
    with pytest.raises(CheckpointError, match=said):
        train(replace(config, train=replace(config.train, steps=7)), folder)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is damaged" in store.damage_of(newest, step_of_file)
    path.write_bytes(content[:50])
    with pytest.raises(CheckpointError, match="does not open as tensors"):
        step_of_tensors(path)

    shutil.rmtree(newest)
    named = replace(config.train, resume=str(folder))
    other = freeze(tmp_path / "full", replace(config, tuning=Full(), train=named))
    with pytest.raises(CheckpointError, match="holds what an adapter trains, and tuning=full"):
        train(replace(config, tuning=Full(), train=named), other)
    full = replace(config, tuning=Full(), train=replace(config.train, steps=1))
    train(full, freeze(tmp_path / "whole", full))
    named = replace(config.train, resume=str(tmp_path / "whole"))
    with pytest.raises(CheckpointError, match="holds the whole model, and tuning=part"):
        train(
            replace(config, train=named),
            freeze(tmp_path / "adapter", replace(config, train=named)),
        )


def change_layout(base, tmp_path, run_workers, before, after):
    """The losses of a run that changes its layout half way, and what it says of that."""
    folder = tmp_path / f"{before[0]}-{before[1]}-{after[0]}-{after[1]}"
    engines = {"single": Single(), **{f"zero{stage}": zero(stage) for stage in range(4)}}
    config = replace(base, checkpoint=replace(base.checkpoint, export=False))
    freeze(folder, config)
    for name, world in (before, after):
        frozen = replace(config, engine=engines[name])
        (folder / "config.yaml").write_text(frozen.to_yaml())
        if name == "single":
            train(frozen, folder)
        else:
            run_workers("train_parts.py", world, folder)
        if (name, world) == before:
            lose_the_end(folder)
    (entry,) = read_object(folder / "run.json")["continued"]
    return losses(folder), entry["notices"][-1]


CHANGES = [
    *((("single", 1), (f"zero{stage}", 2)) for stage in range(4)),
    (("zero3", 2), ("single", 1)),
    (("zero3", 2), ("zero1", 1)),
    (("zero1", 2), ("zero3", 3)),
    (("zero2", 3), ("zero0", 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_another_layout_goes_on_with_the_same_losses(base, tmp_path, run_workers, before, after):
    config = replace(base, checkpoint=replace(base.checkpoint, export=False))
    reference = freeze(tmp_path / "single", config)
    train(config, reference)
    found, said = change_layout(base, tmp_path, run_workers, before, after)
    assert found == pytest.approx(losses(reference), rel=1e-6)
    assert said.startswith(
        f"going on from step 3 with other settings: engine was {before[0]}, now {after[0]}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_whole_checkpoints_hold_what_is_frozen(base, tmp_path, run_workers, stage, tiny_llama):
    """Of a full tuning that trains a part: the export of its checkpoint is the whole model."""
    from posttrain_dist.export import export_checkpoint

    tuning = Full(train=".*norm.*")
    config = replace(base, tuning=tuning, engine=zero(stage))
    folder = freeze(tmp_path / "run", config)
    run_workers("train_runs.py", 2, folder)
    whole = numbers(folder)
    start = load_file(tiny_llama / "model.safetensors")
    out = load_file(export_checkpoint(folder, tmp_path / "out", step=3) / "model.safetensors")
    assert out.keys() == start.keys()
    for name, tensor in out.items():
        assert torch.equal(tensor, start[name]) is not tuning.trained(name), name
    lose_the_end(folder)
    run_workers("train_runs.py", 2, folder)
    assert numbers(folder) == whole
