"""Checkpoints of real runs, damaged and forged in every file: never loaded, never run, told."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch

from posttrain_dist.checkpoint import resume, store
from posttrain_dist.checkpoint.manifest import MANIFEST, read_manifest
from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.engine import AdamW, DeepSpeed, Single
from posttrain_dist.engine.deepspeed import read_full_tensors
from posttrain_dist.engine.state_files import step_of_file
from posttrain_dist.errors import CheckpointError
from posttrain_dist.export import export_checkpoint
from posttrain_dist.files import digest_of, read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare

ENGINES = {
    "single": Single(),
    "zero0": DeepSpeed(stage=0),
    "zero1": DeepSpeed(stage=1),
    "zero3": DeepSpeed(stage=3, persistence_threshold=0),
}


@pytest.fixture(scope="module")
def runs(tiny_llama, rows_file, tmp_path_factory, run_workers):
    """Engine -> run folder with the checkpoints of steps 1 and 2."""
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            optimizer=AdamW(lr=3e-3),
            train=TrainConfig(steps=2, batch_size=2, micro_batch_size=2, save_every=1),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    root = tmp_path_factory.mktemp("damage")
    for name, engine in ENGINES.items():
        frozen = replace(config, engine=engine)
        prepare(frozen, root / name / "prepared")
        (root / name / "config.yaml").write_text(frozen.to_yaml())
    run_workers("train_alone.py", 1, *(root / name for name in ENGINES))
    return {name: root / name for name in ENGINES}


@pytest.fixture
def run(runs, request, tmp_path):
    """A copy of one of them."""
    shutil.copytree(runs[request.param] / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(runs[request.param] / "config.yaml", tmp_path)
    return tmp_path


def choose(run):
    said = []
    return resume.choose("auto", run, step_of_file, said.append), said


def is_passed_over(run, name):
    """Whether the run goes on from step 1 and says so in one line, which names the file."""
    found, said = choose(run)
    assert found == store.folder_of(run, 1)
    (line,) = said
    assert "step-000002 is passed over, going on from step-000001: " in line and "\n" not in line
    return name in line


def damages(folder, places):
    """(file, what is done to it, its new content or None)."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        yield path, "deleted", None
        yield path, "emptied", b""
        yield path, "grown", content + b"\0"
        for place in places(len(content)):
            yield path, f"cut at {place}", content[:place]
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            yield path, f"flipped at {place}", bytes(flipped)


def spread_over(count):
    """That many places, the first and the last among them."""
    return lambda size: sorted({i * (size - 1) // (count - 1) for i in range(count)})


@pytest.mark.parametrize("run", ENGINES, indirect=True)
@pytest.mark.parametrize(
    "places", [spread_over(4), pytest.param(spread_over(400), marks=pytest.mark.slow)]
)
def test_every_damage_of_every_file_is_passed_over(run, places):
    newest = store.folder_of(run, 2)
    assert choose(run) == (newest, [])
    tried = 0
    for path, what, content in damages(newest, places):
        kept = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        if path.name != MANIFEST or meaning(content) != meaning(kept):
            name = MANIFEST if path.name == MANIFEST else path.name
            assert is_passed_over(run, name), what
            tried += 1
            if what == f"cut at {places(len(kept))[1]}":
                with pytest.raises(CheckpointError, match="--step 1"):
                    export_checkpoint(run, run / "out")
        path.write_bytes(kept)
    assert tried >= 11
    assert choose(run) == (newest, [])


def meaning(text):
    """Of a manifest: a blank instead of a line feed damages nothing."""
    try:
        return json.loads(text or b"")
    except ValueError:
        return None


# ------------------------------------------------------------------------------- the manifest


def rewrite(folder, manifest, **changes):
    """The manifest as a forger writes it: with the digests of what is there."""
    manifest = replace(manifest, **changes)
    files = {name: digest_of(folder / name) for name in manifest.files}
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json())


@pytest.mark.parametrize("run", ["single"], indirect=True)
def test_an_export_names_no_damaged_checkpoint_and_a_run_keeps_none(run):
    older, newest = (store.folder_of(run, step) for step in (1, 2))
    kept = {}
    for folder in (newest, older):
        path = folder / "state" / "single.pt"
        kept[folder] = path.read_bytes()
        path.write_bytes(kept[folder][:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"no whole one before it: copy one again; or `post"):
        export_checkpoint(run, run / "out")
    (older / "state" / "single.pt").write_bytes(kept[older])
    # What was passed over no longer counts among those that are kept.
    assert resume.put_newer_aside(run, older) == [run / "checkpoints.old-1" / newest.name]
    assert store.checkpoints(run) == [older]
    assert resume.put_newer_aside(run, older) == []


@pytest.mark.parametrize("run", ["single"], indirect=True)
def test_an_edited_manifest_is_passed_over(run):
    path = store.folder_of(run, 2) / MANIFEST
    kept = json.loads(path.read_text())
    for key, other in {
        "step": 9, "recipe": {"channels": [], "settings": {}}, "layout": {}, "settings": {},
        "lineage": {}, "files": {}, "digest": "0" * 32,
    }.items():  # fmt: skip
        assert kept[key] != other
        path.write_text(json.dumps({**kept, key: other}))
        assert is_passed_over(run, MANIFEST), key
        path.write_text(json.dumps({k: v for k, v in kept.items() if k != key}))
        assert is_passed_over(run, MANIFEST), key
    path.write_text(json.dumps(kept))  # laid out otherwise, and the same
    assert choose(run) == (store.folder_of(run, 2), [])


@pytest.mark.parametrize("run", ENGINES, indirect=True)
def test_a_step_that_is_not_the_states_is_passed_over(run):
    """Its folder renamed and its digest made again: steps 3 to 8 would never be trained."""
    newest = store.folder_of(run, 2)
    rewrite(newest, read_manifest(newest), step=9)
    assert is_passed_over(run, f"{MANIFEST} is of step 9")
    newest.rename(store.folder_of(run, 9))
    found, (said,) = choose(run)
    assert found == store.folder_of(run, 1)
    assert f"is of step 2, and {MANIFEST} of step 9" in said
    with pytest.raises(CheckpointError, match=r"is of step 2(.|\n)*--step 1"):
        export_checkpoint(run, run / "out")


# ----------------------------------------------------------------------------- planted pickles


class Runs:
    """A pickle that runs a command where it is opened by the plain reader."""

    def __init__(self, call, argument):
        self.reduced = call, (argument,)

    def __reduce__(self):
        return self.reduced


def in_archive(path, planted):
    """torch's present format, with everything but the pickle as it was."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in content if name.endswith("data.pkl")]
    content[name] = pickle.dumps({"step": 2, "policy": planted}, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        for each, data in content.items():
            archive.writestr(each, data)


def in_old_format(path, planted):
    torch.save({"policy": planted}, path, _use_new_zipfile_serialization=False)


def as_plain_pickle(path, planted):
    path.write_bytes(pickle.dumps(planted, protocol=2))


FORMS = (in_archive, in_old_format, as_plain_pickle)


def plant(path, form, marker):
    """Make it so that opening `path` as torch would makes the file `marker`."""
    code = f"open({str(marker)!r}, 'w')"
    form(path, Runs(os.system, f"touch {marker}") if form is in_archive else Runs(exec, code))


def test_the_planted_pickles_do_run_in_a_plain_reader(runs, tmp_path):
    for form in FORMS:
        path = tmp_path / "single.pt"
        shutil.copy(store.folder_of(runs["single"], 2) / "state" / "single.pt", path)
        plant(path, form, tmp_path / "ran")
        if form is as_plain_pickle:
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert (tmp_path / "ran").exists(), form
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize("run", ENGINES, indirect=True)
def test_a_planted_pickle_runs_neither_on_resume_nor_on_export(run, tmp_path):
    newest, marker = store.folder_of(run, 2), tmp_path / "ran"
    manifest = read_manifest(newest)
    for path in sorted((newest / "state").rglob("*.pt")):
        kept = path.read_bytes()
        for form in FORMS:
            plant(path, form, marker)
            rewrite(newest, manifest)
            assert is_passed_over(run, f"{path.name} does not open as tensors and plain values: ")
            with pytest.raises(CheckpointError, match="does not open as tensors"):
                export_checkpoint(run, tmp_path / "out", step=2)
            path.write_bytes(kept)
        rewrite(newest, manifest)
    assert choose(run) == (newest, [])
    assert not marker.exists()


def test_the_loaders_themselves_run_no_planted_pickle(runs, tmp_path, run_workers):
    """Past every check that comes before, and where the user has torch's reader set to plain."""
    marker = tmp_path / "ran"
    for name in ("zero1", "zero3"):
        state = store.folder_of(runs[name], 2) / "state"
        forged = []
        for path in sorted(state.rglob("*.pt")):
            copy = tmp_path / f"{name}-{path.stem}"
            shutil.copytree(state, copy)
            plant(copy / path.relative_to(state), in_archive, marker)
            forged.append(copy)
        (output,) = run_workers("load_states.py", 1, runs[name], *forged, state)
        assert output.count("REFUSED") == len(forged) == 2
        assert output.count("posix.system") == 2
        assert f"LOADED {state}" in output
        for copy in forged:
            with pytest.raises(CheckpointError, match=r"posix\.system"):
                list(read_full_tensors(copy))
    assert not marker.exists()


def test_training_goes_on_from_before_a_damaged_checkpoint_of_deepspeed(
    runs, tmp_path, run_workers
):
    folder = tmp_path / "run"
    shutil.copytree(runs["zero1"], folder)
    whole = [row["train/loss"] for row in read_rows(folder / "metrics.jsonl")[1:]]
    (path,) = store.folder_of(folder, 2).rglob("*optim_states.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    run_workers("train_alone.py", 1, folder)
    assert [row["train/loss"] for row in read_rows(folder / "metrics.jsonl")[1:]] == whole
    (entry,) = json.loads((folder / "run.json").read_text())["continued"]
    assert entry["step"] == 1 and path.name in entry["notices"][0]
