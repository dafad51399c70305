"""Checkpoints on several ranks, how one is committed, and what is kept of them."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
import xxhash

from posttrain_dist.checkpoint import resume, store
from posttrain_dist.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    Layout,
    Manifest,
    Recipe,
    is_whole,
    read_manifest,
)
from posttrain_dist.config import RunConfig
from posttrain_dist.errors import CheckpointError
from posttrain_dist.export import export_checkpoint
from posttrain_dist.files import FileDigest

LAYOUT = Layout("single", 1, "float32")
CONTENT = b"some weights"


def write_state(folder):
    (folder / "x").write_bytes(CONTENT)
    (folder / "below").mkdir()
    (folder / "below" / "y").write_bytes(b"y")
    return {}  # as by a library that writes its files itself


def write(folder, step, keep=0, best=None, write_state=write_state):
    manifest = Manifest(step=step, recipe=Recipe(["a"], {"seed": "1"}), layout=LAYOUT)
    return store.save(folder, manifest, write_state, keep=keep, best=best)


# ------------------------------------------------------------------------------------ ranks


def test_one_failing_rank_fails_all_and_hurts_no_checkpoint(tmp_path, run_workers):
    outputs = run_workers("fail_on_one.py", 2, tmp_path, timeout_s=60)
    assert "SAID CheckpointError" in outputs[0] and "1 of the other ranks failed" in outputs[0]
    assert "step 2 cannot be written: PytorchStreamWriter failed" in outputs[1]
    assert all("AGREED rank 0 looked" in output for output in outputs)
    (whole,) = store.whole_checkpoints(tmp_path)
    assert whole.name == "step-000003"
    files = read_manifest(whole).files
    assert sorted(files) == ["state/rank-0", "state/rank-1"]  # the digests of both came together
    assert files["state/rank-1"] == FileDigest(3, xxhash.xxh3_128_hexdigest(b"1 3"))

    # A file that one of them then finds damaged is damaged for both.
    assert all("FOUND ''\n" in output for output in outputs)
    assert all("FOUND state/rank-1 is damaged: its content" in output for output in outputs)


# ----------------------------------------------------------------------------------- commit


def test_a_commit_renames_and_never_copies(tmp_path):
    """The folder with the final name is the very one that was written: there is no moment at which
    it is there and not whole."""
    inodes = {}

    def remember(folder):
        digests = write_state(folder)
        paths = [folder.parent, *folder.parent.rglob("*")]
        inodes.update({p.relative_to(folder.parent): p.stat().st_ino for p in paths})
        return digests

    final = write(tmp_path, 1, write_state=remember)
    assert len(inodes) == 5
    for name, inode in inodes.items():
        assert (final / name).stat().st_ino == inode, name
    assert sorted(path.name for path in final.parent.iterdir()) == ["latest", "step-000001"]


def test_an_older_checkpoint_of_the_same_step_is_replaced(tmp_path):
    first = write(tmp_path, 1)
    (first / "state" / "stale").write_bytes(b"old")
    final = write(tmp_path, 1)
    assert final == first and sorted(path.name for path in (final / "state").iterdir()) == [
        "below",
        "x",
    ]
    assert sorted(path.name for path in final.parent.iterdir()) == ["latest", "step-000001"]


def test_a_file_that_does_not_reach_the_disk_is_no_checkpoint(tmp_path):
    """As on nodes that share no disk: what another rank wrote is not there for rank 0."""
    for claimed, reason in (
        ({"z": FileDigest(1, "0" * 32)}, "state/z"),
        ({"x": FileDigest(99, "0" * 32)}, "12 bytes on the disk, 99 were written"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            write(tmp_path, 1, write_state=lambda folder, c=claimed: write_state(folder) or c)
        assert store.whole_checkpoints(tmp_path) == []


# --------------------------------------------------------------------------------- manifest


def test_the_manifest_parts_recipe_from_layout_and_names_each_file(tmp_path):
    final = write(tmp_path, 7)
    values = json.loads((final / MANIFEST).read_text())
    assert values["recipe"] == {"channels": ["a"], "settings": {"seed": "1"}, "model": {}}
    assert values["layout"] == {"engine": "single", "workers": 1, "dtype": "float32"}
    assert (values["step"], values["format"]) == (7, FORMAT)
    assert len(values["digest"]) == 32
    assert values["files"] == {
        "state/below/y": {"bytes": 1, "xxh3_128": xxhash.xxh3_128_hexdigest(b"y")},
        "state/x": {"bytes": 12, "xxh3_128": xxhash.xxh3_128_hexdigest(CONTENT)},
    }


def test_a_digest_made_while_writing_is_taken_over_and_the_file_not_read_again(tmp_path):
    made = FileDigest(len(CONTENT), "0" * 32)  # not the one of the content
    final = write(tmp_path, 1, write_state=lambda folder: write_state(folder) or {"x": made})
    files = read_manifest(final).files
    assert files["state/x"] == made
    assert files["state/below/y"].xxh3_128 == xxhash.xxh3_128_hexdigest(b"y")


@pytest.mark.parametrize("size", [0, len(CONTENT) - 1, len(CONTENT) + 1])
def test_a_file_of_another_size_makes_it_no_checkpoint(tmp_path, size):
    before, final = write(tmp_path, 1), write(tmp_path, 2)
    os.truncate(final / "state" / "x", size)
    assert is_whole(before) and not is_whole(final)
    assert store.whole_checkpoints(tmp_path) == [before]
    with pytest.raises(CheckpointError, match="is no whole checkpoint"):
        read_manifest(final)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/gloo/transport/tcp/pair.cc:537] Read error: reset by peer"),
        ConnectionResetError("reset by peer"),
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
    ],
)
def test_a_rank_that_is_gone_is_no_fault_of_the_disk(tmp_path, error):
    """A user's error ends the run; this one must reach the launcher, which replaces the worker."""

    def fail(_):
        raise error

    with pytest.raises(type(error), match=r"reset by peer|remote process"):
        write(tmp_path, 1, write_state=fail)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, 1, write_state=lambda _: (_ for _ in ()).throw(OSError("No space left")))


def choose(run_folder, resumed="auto"):
    """The checkpoint that a run goes on from, and what it says of those that it passes over."""
    said = []
    return resume.choose(str(resumed), run_folder, lambda path: None, said.append), said


def test_a_damaged_newest_is_passed_over_aloud_and_never_exported_around(tmp_path, caplog):
    before, final = write(tmp_path, 1), write(tmp_path, 2)
    (tmp_path / "config.yaml").write_text(RunConfig().to_yaml())
    os.truncate(final / "state" / "x", 1)
    (tmp_path / "checkpoints" / "step-old3").mkdir()  # somebody's own, and none of ours
    with caplog.at_level("INFO", "posttrain_dist"):
        found, said = choose(tmp_path)
    assert found == before and f"going on from {before}" in caplog.text
    why = "state/x has 1 bytes, and 12 were written"
    assert said == [f"{final} is passed over, going on from step-000001: {why}"]
    fault = f"step-000002: is the newest checkpoint and damaged: {why}"
    with pytest.raises(CheckpointError, match=rf"{fault}(.|\n)*--step 1"):
        export_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": {"state/x": {}}}'])
def test_a_torn_manifest_is_no_checkpoint(tmp_path, text):
    final = write(tmp_path, 2)
    (final / MANIFEST).write_text(text)
    assert not is_whole(final)


def test_where_none_is_whole_the_error_names_each_and_the_ways_out(tmp_path):
    before, final = write(tmp_path, 1), write(tmp_path, 2)
    content = bytearray(CONTENT)
    content[5] ^= 1
    (final / "state" / "x").write_bytes(content)
    assert is_whole(final)  # by names and sizes
    changed = "is damaged: its content has changed since it was written"
    assert choose(tmp_path) == (
        before,
        [f"{final} is passed over, going on from step-000001: state/x {changed}"],
    )
    (before / "state" / "below" / "y").unlink()
    with pytest.raises(CheckpointError) as caught:
        choose(tmp_path)
    assert f"step-000002: state/x {changed}; step-000001: state/below/y cannot" in caught.value.what
    assert f"posttrain run {tmp_path} train.resume=never" in caught.value.fix
    assert choose(tmp_path, "never") == (None, [])
    resume.archive(tmp_path)
    assert choose(tmp_path) == (None, [])  # as the error says


def test_another_runs_folder_is_fallen_back_in_and_a_named_checkpoint_is_refused(tmp_path):
    other, new = tmp_path / "other", tmp_path / "new"
    before, final = write(other, 1), write(other, 2)
    assert choose(new, other) == (final, [])
    (final / "state" / "x").write_bytes(CONTENT[::-1])
    found, said = choose(new, other)
    assert found == before and len(said) == 1 and "step-000002 is passed over" in said[0]
    with pytest.raises(CheckpointError, match=r"state/x is damaged(.|\n)*name another one: step-0"):
        choose(new, final)
    own = write(new, 1)
    assert choose(new, other) == (own, [])
    (own / "state" / "x").unlink()  # never by way of another run, unasked
    with pytest.raises(CheckpointError, match="no checkpoint is whole: step-000001: state/x"):
        choose(new, other)


def test_what_a_file_says_of_its_step_must_be_the_manifests(tmp_path):
    final = write(tmp_path, 2, write_state=lambda f: (f / "x.pt").write_bytes(b"x") and {})
    assert store.damage_of(final, lambda path: 2) == ""
    assert store.damage_of(final, lambda path: 9) == (
        "state/x.pt is of step 9, and MANIFEST.json of step 2"
    )
    (final / "state" / "y_optim_states.pt").write_bytes(b"x")  # DeepSpeed reads by a pattern
    assert "y_optim_states.pt is not in MANIFEST" in store.damage_of(final, lambda path: 2)


def test_an_older_format_is_refused_and_not_passed_over(tmp_path):
    """A run must not start again at step 0 because it cannot read what it has."""
    final = write(tmp_path, 2)
    values = {"step": 2, "layout": {}, "channels": [], "files": {"state/x": 12}, "format": 2}
    (final / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"has format 2, this version reads {FORMAT}"):
        choose(tmp_path)


def test_what_differs_is_named(tmp_path):
    run = Manifest(step=0, recipe=Recipe(["a"], {"seed": "1"}), layout=LAYOUT)
    final = write(tmp_path, 2)
    assert resume.check_compatible(final, run, 2).step == 2
    for other, steps, reason in (
        ({"layout": Layout("zero3", 2, "float32")}, 2, "engine=single, workers=1, .*engine=zero3"),
        ({"recipe": Recipe(["a", "b"], {"seed": "1"})}, 2, r"channels \['a'\].*\['a', 'b'\]"),
        ({"recipe": Recipe(["a"], {"seed": "2"})}, 2, "seed was 1, now 2"),
        ({}, 1, "is at step 2, and this run has 1 steps"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            resume.check_compatible(final, replace(run, **other), steps)


# ---------------------------------------------------------------------------- what is kept


def test_the_newest_stay_and_the_one_just_written_always(tmp_path):
    for step in (5, 6, 999_999, 1_000_000):
        write(tmp_path, step)
    names = [path.name for path in store.whole_checkpoints(tmp_path)]
    assert names == ["step-000005", "step-000006", "step-999999", "step-1000000"]
    write(tmp_path, 3, keep=3)
    names = [path.name for path in store.whole_checkpoints(tmp_path)]
    assert names == ["step-000003", "step-999999", "step-1000000"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003\n"
    assert read_manifest(tmp_path / "checkpoints" / "step-000003").step == 3


def test_the_checkpoint_of_the_best_evaluation_stays(tmp_path):
    def names() -> list[str]:
        return [path.name for path in store.whole_checkpoints(tmp_path)]

    for step, best in ((2, 2), (4, 4), (6, 5), (8, 5), (10, 5)):
        write(tmp_path, step, keep=2, best=best)
    assert names() == ["step-000004", "step-000008", "step-000010"]  # 4 is at or before 5
    write(tmp_path, 12, keep=2, best=11)
    assert names() == ["step-000010", "step-000012"]
    write(tmp_path, 14, keep=2, best=None)
    assert names() == ["step-000012", "step-000014"]
