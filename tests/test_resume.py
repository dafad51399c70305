"""Save, stop, resume: the resumed run is the uninterrupted run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from posttrain_dist.checkpoint import store
from posttrain_dist.checkpoint.manifest import MANIFEST, read_manifest
from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.engine import AdamW, DeepSpeed, Single
from posttrain_dist.errors import CheckpointError, TrainingError
from posttrain_dist.export import export_checkpoint
from posttrain_dist.files import read_object, read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train

ZERO3 = DeepSpeed(stage=3, persistence_threshold=0)


@pytest.fixture(scope="module")
def base(tiny_llama, rows_file):
    return complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            optimizer=AdamW(lr=3e-3),
            train=TrainConfig(steps=6, batch_size=4, micro_batch_size=2, save_every=3),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )


def freeze(folder, config):
    folder.mkdir(parents=True)
    prepare(config, folder / "prepared")
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


def numbers(folder):
    """metrics.jsonl without what depends on the clock and the machine."""
    rows = read_rows(folder / "metrics.jsonl")
    outside = ("time_s", "system/memory_bytes", "train/tokens_per_s")
    return [{k: v for k, v in row.items() if k not in outside} for row in rows]


def lose_everything_after(folder, step):
    """What a kill after `step` leaves: later checkpoints, results and rows are not there."""
    for path in store.whole_checkpoints(folder):
        if read_manifest(path).step > step:
            (path / MANIFEST).unlink()  # torn: its manifest was never written
    (folder / "logs" / "outcome.json").unlink()
    with (folder / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 7, "train/lo')  # torn last line


def test_a_resumed_run_equals_the_uninterrupted_one(base, tmp_path):
    folder = freeze(tmp_path / "run", replace(base, engine=Single()))
    config = replace(base, engine=Single())
    train(config, folder)
    whole = numbers(folder)
    assert [row["step"] for row in whole] == [0, 1, 2, 3, 4, 5, 6]
    lose_everything_after(folder, 3)
    train(config, folder)
    assert numbers(folder) == whole  # bit for bit
    steps = [line.split("\t")[0] for line in (folder / "samples.log").read_text().splitlines()]
    assert steps == ["1", "2", "3", "4", "5", "6"]


def test_two_runs_of_one_config_are_the_same_bit_for_bit(base, tmp_path):
    first = freeze(tmp_path / "first", base)
    second = freeze(tmp_path / "second", base)
    train(base, first)
    train(base, second)
    assert numbers(first) == numbers(second)
    other = freeze(tmp_path / "other", replace(base, seed=1))
    train(replace(base, seed=1), other)
    assert numbers(first) != numbers(other)


def test_zero3_on_two_ranks_resumes_and_its_checkpoint_exports(base, tmp_path, run_workers):
    folder = freeze(tmp_path / "run", replace(base, engine=ZERO3))
    run_workers("train_runs.py", 2, folder)
    whole = numbers(folder)
    lose_everything_after(folder, 3)
    run_workers("train_runs.py", 2, folder)
    assert numbers(folder) == whole
    # Streamed from the shards, without ranks: the tensors that the training itself exported.
    from safetensors.torch import load_file

    out = export_checkpoint(folder, tmp_path / "out")
    streamed = load_file(out / "model.safetensors")
    exported = load_file(folder / "export" / "model.safetensors")
    assert streamed.keys() == exported.keys()
    assert all(torch.equal(streamed[name], exported[name]) for name in exported)
    earlier = export_checkpoint(folder, tmp_path / "earlier", step=3)
    moved = load_file(earlier / "model.safetensors")
    assert any(not torch.equal(moved[name], exported[name]) for name in exported)


def test_stop_saves_and_leaves_and_the_run_goes_on(base, tmp_path):
    folder = freeze(tmp_path / "run", base)
    train(base, folder)
    whole = numbers(folder)
    stopped = freeze(tmp_path / "stopped", base)
    (stopped / "STOP").touch()
    train(base, stopped)
    outcome = json.loads((stopped / "logs" / "outcome.json").read_text())
    assert outcome == {"outcome": "stopped", "step": 1, "total_steps": 6}
    assert [path.name for path in store.whole_checkpoints(stopped)] == ["step-000001"]
    assert not (stopped / "export").exists()
    (stopped / "STOP").unlink()
    train(base, stopped)
    assert numbers(stopped) == whole


def test_never_starts_again_and_loses_nothing(base, tmp_path):
    folder = freeze(tmp_path / "run", base)
    train(base, folder)
    whole = numbers(folder)
    short = replace(base.train, resume="never", steps=2, save_every=None)
    train(replace(base, train=short), folder)
    assert [row["step"] for row in numbers(folder)] == [0, 1, 2]
    assert [path.name for path in store.whole_checkpoints(folder)] == ["step-000002"]
    old = sorted(path.name for path in (folder / "checkpoints.old-1").glob("step-*"))
    assert old == ["step-000003", "step-000006"]
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints.old-1").rename(folder / "checkpoints")
    train(base, folder)  # the older training is still whole: it is found finished
    assert json.loads((folder / "logs" / "outcome.json").read_text())["step"] == 6
    assert whole[-1]["step"] == 6


def test_a_path_starts_from_there(base, tmp_path):
    folder = freeze(tmp_path / "run", base)
    train(base, folder)
    whole = numbers(folder)
    named = str(folder / "checkpoints" / "step-000003")
    config = replace(base, train=replace(base.train, resume=named))
    other = freeze(tmp_path / "other", config)
    train(config, other)
    assert numbers(other) == whole[4:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"data": {"max_length": 32}}, "data.max_length was 64, now 32; data was"),
        ({"train": {"batch_size": 2}}, "train.batch_size was 4, now 2"),
        ({"train": {"steps": 2}}, "is at step 3, and this run has 2 steps"),
    ],
)
def test_what_changes_the_order_of_samples_is_refused(base, tmp_path, change, said):
    first = replace(base, train=replace(base.train, steps=3))
    folder = freeze(tmp_path / "run", first)
    train(first, folder)
    values = {
        key: replace(getattr(base, key), **value) if isinstance(value, dict) else value
        for key, value in change.items()
    }
    changed = replace(base, **values)
    changed = replace(changed, train=replace(changed.train, resume=str(folder)))
    other = freeze(tmp_path / "other", changed)
    with pytest.raises(CheckpointError, match=said):
        train(changed, other)


def test_a_window_of_logging_is_the_same_after_a_resume(base, tmp_path):
    config = replace(base, train=replace(base.train, log_every=4))
    folder = freeze(tmp_path / "run", config)
    train(config, folder)
    whole = numbers(folder)
    assert [row["step"] for row in whole] == [0, 3, 4, 6]
    lose_everything_after(folder, 3)
    train(config, folder)
    assert numbers(folder) == whole


def test_a_stop_in_the_last_step_is_a_finished_run(base, tmp_path):
    config = replace(base, train=replace(base.train, steps=1))
    folder = freeze(tmp_path / "run", config)
    (folder / "STOP").touch()
    train(config, folder)
    assert json.loads((folder / "logs" / "outcome.json").read_text())["outcome"] == "completed"
    assert "eval/loss" in numbers(folder)[-1]


def test_deepspeed_trains_twice_in_one_process(base, tmp_path, run_workers):
    """The process group stays: DeepSpeed would go on asking for the first one."""
    config = replace(base, engine=DeepSpeed(stage=1))
    folders = [freeze(tmp_path / name, config) for name in ("first", "second")]
    run_workers("train_alone.py", 1, *folders)
    assert numbers(folders[0]) == numbers(folders[1])


def test_another_layout_is_refused_by_name(base, tmp_path):
    folder = freeze(tmp_path / "run", base)
    train(base, folder)
    other = replace(base, engine=DeepSpeed(stage=0))
    message = r"engine=single, workers=1.*this run has engine=zero0"
    with pytest.raises(CheckpointError, match=message):
        train(other, folder)


def test_log_every_averages_over_its_steps(base, tmp_path):
    folder = freeze(tmp_path / "each", base)
    train(base, folder)
    each = numbers(folder)
    rare = replace(base, train=replace(base.train, log_every=4, save_every=None))
    folder = freeze(tmp_path / "rare", rare)
    train(rare, folder)
    rows = numbers(folder)
    assert [row["step"] for row in rows] == [0, 4, 6]
    examples = Examples.open(folder / "prepared", "train")
    weights = {examples[i].sample_id: examples[i].weight_L.sum() for i in range(len(examples))}
    samples = [line.split("\t")[1] for line in (folder / "samples.log").read_text().splitlines()]
    tokens = [sum(weights[int(sample)] for sample in line.split()) for line in samples]
    total = sum(t * row["train/loss"] for t, row in zip(tokens[:4], each[1:5], strict=True))
    assert rows[1]["train/loss"] == pytest.approx(total / sum(tokens[:4]), rel=1e-6)


def test_only_the_newest_checkpoints_stay(base, tmp_path):
    config = replace(base, train=replace(base.train, save_every=1))
    folder = freeze(tmp_path / "run", config)
    train(config, folder)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["latest", "step-000005", "step-000006"]
    assert (folder / "checkpoints" / "latest").read_text() == "step-000006\n"


def test_a_cut_file_is_no_checkpoint(base, tmp_path):
    folder = freeze(tmp_path / "run", base)
    train(base, folder)
    newest = store.whole_checkpoints(folder)[-1]
    state = newest / "state" / "single.pt"
    state.write_bytes(state.read_bytes()[:-1])
    assert [path.name for path in store.whole_checkpoints(folder)] == ["step-000003"]
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        read_manifest(newest)


def test_a_damaged_file_is_never_trained_on_nor_exported(base, tmp_path):
    """One byte of the newest weights is another, and the size is as it was."""
    folder = freeze(tmp_path / "run", base)
    train(base, folder)
    expected = numbers(folder)
    newest = store.whole_checkpoints(folder)[-1]
    state = newest / "state" / "single.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state/single\.pt is damaged(.|\n)*--step 3"):
        export_checkpoint(folder, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    train(base, folder)
    assert numbers(folder) == expected
    said = f"{newest} is passed over, going on from step-000003: state/single.pt is damaged: "
    assert said in (folder / "logs" / "rank-0.log").read_text()
    (entry,) = read_object(folder / "run.json")["continued"]
    assert entry["step"] == 3 and entry["notices"][0].startswith(said)
    assert entry["notices"][1:] == [
        f"step-000006 is kept in {folder}/checkpoints.old-1",
        "going on from step 3",
    ]
    export_checkpoint(folder, tmp_path / "x")  # it was written again


def test_another_learning_rate_is_said_once_and_recorded(base, tmp_path):
    folder = freeze(tmp_path / "run", base)
    train(base, folder)
    lose_everything_after(folder, 3)
    changed = replace(base, optimizer=replace(base.optimizer, lr=1e-3))
    train(changed, folder)
    assert numbers(folder)[4]["train/lr"] < 1e-3
    said = "going on from step 3 with other settings: optimizer.lr was 0.003, now 0.001"
    assert (folder / "logs" / "rank-0.log").read_text().count(said) == 1
    notices = [row["text"] for row in read_rows(folder / "logs" / "notices.jsonl")]
    # A torn one was passed over and put aside first.
    assert [said in text for text in notices] == [False, False, True]
    assert read_object(folder / "run.json")["continued"][0]["notices"] == notices


def test_the_state_of_another_model_is_refused_in_words(base, tmp_path, builders):
    folder = freeze(tmp_path / "run", base)
    train(base, folder)
    larger = builders.model(tmp_path / "model", hidden_size=40)
    named = replace(base.train, resume=str(folder))
    config = replace(base, model=ModelConfig(path=str(larger)), train=named)
    other = freeze(tmp_path / "other", config)
    with pytest.raises(CheckpointError, match=r"hidden_size: 32 -> 40\n(.|\n)*model\.path"):
        train(config, other)
    # A checkpoint of before manifests knew the network: its state says so.
    for step in store.whole_checkpoints(folder):
        manifest = read_manifest(step)
        manifest = replace(manifest, recipe=replace(manifest.recipe, model={}))
        (step / MANIFEST).write_text(manifest.to_json())
    with pytest.raises(CheckpointError, match=r"does not fit this model: (.|\n)*model\.path"):
        train(config, other)


def test_lost_weights_are_never_saved(base, tmp_path, monkeypatch):
    """A gradient that is not finite ends the run; what was good before stays, and says so."""
    from posttrain_dist.engine.single import SingleEngine

    plain, steps = SingleEngine.step, []

    def step(engine, lr):
        norm = plain(engine, lr)
        steps.append(norm)
        return float("nan") if len(steps) == 5 else norm

    monkeypatch.setattr(SingleEngine, "step", step)
    config = replace(base, train=replace(base.train, steps=9, save_every=2))
    folder = freeze(tmp_path / "run", config)
    with pytest.raises(TrainingError) as caught:
        train(config, folder)
    good = folder / "checkpoints" / "step-000004"
    assert "step 5: " in str(caught.value) and str(good) in str(caught.value)
    assert [path.name for path in store.whole_checkpoints(folder)] == ["step-000002", good.name]
    assert not (folder / "logs" / "outcome.json").exists() and not (folder / "export").exists()
    last = numbers(folder)[-1]
    assert (last["step"], last["alarm/not_finite"]) == (5, 1.0)  # told before it ended
    again = freeze(
        tmp_path / "again", replace(config, train=replace(config.train, resume=str(good)))
    )
    monkeypatch.undo()
    train(replace(config, train=replace(config.train, resume=str(good))), again)
    assert numbers(again)[-1]["step"] == 9
