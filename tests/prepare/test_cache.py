"""What a cache entry is an entry of, and what becomes of entries that are lost, left or old."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posttrain_dist
from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, complete
from posttrain_dist.data import OnBadRow, Source
from posttrain_dist.data.packs.mixing import make_mixture
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.data.prepared.summary import Summary
from posttrain_dist.errors import DataError
from posttrain_dist.prepare import build_dataset as build
from posttrain_dist.prepare import (
    find_prepared,
    fingerprint,
    prepare,
    prepare_cached,
    row_encoder,
)
from posttrain_dist.prepare.cache import KEPT_DAYS
from posttrain_dist.prepare.data_report import data_report
from posttrain_dist.prepare.digests import Digests
from posttrain_dist.prepare.processes import workers


@pytest.fixture
def make(tiny_llama: Path, tmp_path: Path) -> Any:
    def config(**data: Any) -> RunConfig:
        values = {"max_length": 64, "eval_fraction": 0.0, "cache": str(tmp_path / "c"), **data}
        return complete(
            RunConfig(model=ModelConfig(path=str(tiny_llama)), data=DataConfig(**values))
        )

    return config


def of_task(builders: Any, path: Path, task: str, count: int) -> Path:
    return builders.write(path, [builders.chat(f"{task} {i}", "a", task) for i in range(count)])


def entry_of(tmp_path: Path) -> Path:
    (entry,) = (path for path in (tmp_path / "c").iterdir() if path.is_dir())
    return entry


# ------------------------------------------------------------------------------- what it is of


def test_sources_in_another_order_keep_their_weights(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    sources = {
        name: Source(path=str(of_task(builders, tmp_path / f"{name}.jsonl", name, 40)), weight=w)
        for name, w in (("big", 9.0), ("small", 1.0))
    }
    for order in (["big", "small"], ["small", "big"]):
        config = make(sources={name: sources[name] for name in order})
        examples = Examples.open(prepare_cached(config), "train")
        mixture = make_mixture(config.data, config.seed, examples)
        assert mixture is not None
        drawn = examples.channel_ids[mixture.draw(0, 0)]
        assert np.mean(drawn == examples.channels.index("big")) == pytest.approx(0.9, abs=0.01)


def test_each_slice_of_a_dataset_is_its_own(make: Any, builders: Any, tmp_path: Path) -> None:
    of_task(builders, tmp_path / "set" / "train.jsonl", "t", 60)
    found = {}
    for part in ("train[:10]", "train[:30]", "train"):
        config = make(train=f"hf:{tmp_path}/set:{part}")
        found[part] = len(Examples.open(prepare_cached(config), "train"))
    assert found == {"train[:10]": 10, "train[:30]": 30, "train": 60}


def test_the_seed_of_a_sweep_does_not_tokenise_again(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    train = of_task(builders, tmp_path / "a.jsonl", "t", 20)
    heldout = of_task(builders, tmp_path / "b.jsonl", "other", 3)
    given = make(train=str(train), eval=str(heldout))
    assert prepare_cached(given) == prepare_cached(dataclasses.replace(given, seed=7))
    split = make(train=str(train), eval_fraction=0.5)
    assert prepare_cached(split) != prepare_cached(dataclasses.replace(split, seed=7))


def test_a_file_that_changes_while_it_is_read_is_refused(
    make: Any, builders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = of_task(builders, tmp_path / "rows.jsonl", "t", 20)
    plain = build.encode

    def meanwhile(*args: Any) -> Any:
        with data.open("a") as stream:
            stream.write(json.dumps(builders.chat("late", "row", "t")) + "\n")
        return plain(*args)

    monkeypatch.setattr(build, "encode", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare_cached(make(train=str(data)))
    assert not [path for path in (tmp_path / "c").iterdir() if path.is_dir()]


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file, store = tmp_path / "a", tmp_path / "hashes.json"
    file.write_text("one")
    os.utime(file, (1, 1))
    digests = Digests(store)
    first = digests.of(file)
    digests.save()
    stored = json.loads(store.read_text())
    stored[str(file)][1] = "as stored"
    store.write_text(json.dumps(stored))
    assert Digests(store).of(file) == "as stored"
    file.write_text("two")
    fresh = Digests(store)
    second = fresh.of(file)
    assert second not in (first, "as stored")
    fresh.save()  # changed a moment ago: it may change again within one tick of the clock
    assert json.loads(store.read_text())[str(file)][1] == "as stored"
    store.write_text("no JSON")
    assert Digests(store).of(file) == second


def test_a_changed_version_of_what_is_written_makes_another_entry(
    make: Any, builders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(train=str(of_task(builders, tmp_path / "rows.jsonl", "t", 20)))
    prepare(config, tmp_path / "p")
    first = prepare_cached(config)
    monkeypatch.setattr(fingerprint, "FORMAT", fingerprint.FORMAT + 1)
    assert prepare_cached(config) != first
    prepare(config, tmp_path / "p")  # a run that was begun goes on all the same


def test_a_comment_in_the_code_changes_no_key(builders: Any, tmp_path: Path) -> None:
    """A copy of the program that differs in a comment shares the entries of the cache."""
    rows = of_task(builders, tmp_path / "rows.jsonl", "t", 20)
    data = DataConfig(train=str(rows), cache=str(tmp_path / "c"))
    config = complete(RunConfig(model=ModelConfig(path="tiny_base"), data=data))
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from posttrain_dist.config import RunConfig
        from posttrain_dist.prepare import fingerprint
        config = RunConfig.from_yaml(Path(sys.argv[1]).read_text())
        print(fingerprint.fingerprint(config, only_heldout=False).key, fingerprint.__file__)
    """)
    package = tmp_path / "copy" / "posttrain_dist"
    shutil.copytree(Path(posttrain_dist.__file__).parent, package)
    for file in ("data/chat/encoder.py", "prepare/split.py"):
        with (package / file).open("a") as stream:
            stream.write("# a comment\n")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    found = subprocess.run(
        [sys.executable, "-c", script, "config.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        cwd=tmp_path,
    )
    assert found.returncode == 0, found.stderr
    key, file = found.stdout.split()
    assert file == str(package / "prepare" / "fingerprint.py")
    assert key == fingerprint.fingerprint(config, only_heldout=False).key


# --------------------------------------------------------------------------- lost, left, old


@pytest.mark.parametrize("lost", ["summary.json", "samples/tokens.npy", "train.npy"])
def test_an_entry_that_lost_a_file_is_built_again(
    make: Any, builders: Any, tmp_path: Path, lost: str
) -> None:
    config = make(train=str(of_task(builders, tmp_path / "rows.jsonl", "t", 20)))
    entry = prepare_cached(config)
    (entry / lost).unlink()
    assert prepare_cached(config) == entry
    assert len(Examples.open(entry, "train")) == 20


def damage_index(entry: Path) -> None:
    index = np.load(entry / "train.npy")
    index[-1] = 1_000_000
    np.save(entry / "train.npy", index)


def damage_summary(entry: Path) -> None:
    values = json.loads((entry / "summary.json").read_bytes())
    (entry / "summary.json").write_text(json.dumps({**values, "longest": "x"}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "samples" / "supervised.npy").write_bytes(b""),
        lambda entry: (entry / "train.npy").write_bytes(b"no array"),
        damage_index,
        damage_summary,
    ],
)
def test_a_damaged_entry_is_built_again(
    damage: Any, make: Any, builders: Any, tmp_path: Path
) -> None:
    config = make(train=str(of_task(builders, tmp_path / "rows.jsonl", "a", 8)))
    prepare_cached(config)
    damage(entry_of(tmp_path))
    assert find_prepared(config) is None
    prepare_cached(config)
    found = find_prepared(config)
    assert found is not None and len(Examples.open(found, "train")) == 8


def test_a_prepared_folder_that_lost_a_file_says_so(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    config = make(train=str(of_task(builders, tmp_path / "rows.jsonl", "t", 20)))
    prepare(config, tmp_path / "p")
    (tmp_path / "p" / "eval.npy").unlink()
    with pytest.raises(DataError, match=r"lacks a file.*\n.*delete this folder"):
        prepare(config, tmp_path / "p")


def test_an_entry_is_used_where_nothing_can_be_written(
    make: Any, builders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(train=str(of_task(builders, tmp_path / "rows.jsonl", "t", 20)))
    entry = prepare_cached(config)
    lock = entry.with_name(entry.name + ".lock")
    lock.unlink()
    lock.mkdir()  # cannot be opened to write, whoever runs this
    monkeypatch.setattr(
        "posttrain_dist.prepare.build_dataset.build_dataset", lambda *_: pytest.fail("built again")
    )
    assert prepare_cached(config) == entry
    prepare(config, tmp_path / "p")
    assert (tmp_path / "p" / "train.npy").samefile(entry / "train.npy")


def test_a_cache_that_cannot_be_used_is_said(make: Any, builders: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    data = of_task(builders, tmp_path / "rows.jsonl", "t", 20)
    config = make(train=str(data), cache=str(tmp_path / "file" / "c"))
    said: list[str] = []
    prepare(config, tmp_path / "p", say=said.append)
    assert len(Examples.open(tmp_path / "p", "train")) == 20
    (line,) = said
    assert "data.cache" in line and str(tmp_path / "file" / "c") in line
    with pytest.raises(DataError, match=r"data\.cache"):
        prepare_cached(config)


def test_a_fault_of_the_data_is_none_of_the_cache(
    make: Any, builders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = of_task(builders, tmp_path / "rows.jsonl", "t", 20)
    plain, built = build.encode, []

    def gone(*args: Any) -> Any:
        built.append(args)
        yield from plain(*args)
        data.unlink()

    monkeypatch.setattr(build, "encode", gone)
    said: list[str] = []
    with pytest.raises(DataError, match="cannot be read"):
        prepare(make(train=str(data)), tmp_path / "p", say=said.append)
    assert len(built) == 1 and not said


def test_what_a_killed_process_left_is_removed_by_the_next(
    make: Any, builders: Any, tmp_path: Path
) -> None:
    left, old = tmp_path / "c" / ("a" * 32 + ".partial"), tmp_path / "c" / ("b" * 32)
    others = [tmp_path / "c" / "download.partial", tmp_path / "c" / "model"]
    for folder in (left, old, *others):
        folder.mkdir(parents=True)
        folder.with_suffix(".lock").touch()
        os.utime(folder, (1, 1) if folder in others else None)
    recent = prepare_cached(make(train=str(of_task(builders, tmp_path / "a.jsonl", "t", 9))))
    assert not left.exists() and old.exists()
    then = time.time() - (KEPT_DAYS + 1) * 86400
    os.utime(old, (then, then))
    prepare_cached(make(train=str(of_task(builders, tmp_path / "b.jsonl", "t", 8))))
    assert not old.exists() and recent.exists()
    assert all(folder.is_dir() for folder in others)  # somebody else's


def test_a_run_goes_on_when_its_data_is_gone(make: Any, builders: Any, tmp_path: Path) -> None:
    data = of_task(builders, tmp_path / "rows.jsonl", "t", 20)
    config = make(train=str(data))
    before = prepare(config, tmp_path / "p")
    data.unlink()
    said: list[str] = []
    assert prepare(config, tmp_path / "p", say=said.append) == before
    assert str(data) in said[0] and "going on" in said[0]
    assert data_report(config, tmp_path / "p")["files"][0]["path"] == str(data)


def test_the_report_names_the_files_of_this_run(make: Any, builders: Any, tmp_path: Path) -> None:
    data = of_task(builders, tmp_path / "one" / "rows.jsonl", "t", 20)
    with data.open("a") as stream:
        stream.write("{\n")
    prepare_cached(make(train=str(data), on_bad_row=OnBadRow.skip))
    data.parent.rename(tmp_path / "two")
    data = tmp_path / "two" / "rows.jsonl"
    config = make(train=str(data), on_bad_row=OnBadRow.skip)
    report = data_report(config, prepare_cached(config))
    entry_of(tmp_path)  # there is one: the content was met before
    assert [file["path"] for file in report["files"]] == [str(data)]
    assert {example["where"].rpartition(":")[0] for example in report["examples"]["t"]} == {
        str(data)
    }
    assert [(row["file"], row["line"]) for row in report["rejected"]] == [(str(data), 21)]


# ------------------------------------------------------------------------ processes and chunks


def test_many_small_chunks_are_the_same_bytes(
    make: Any, builders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = builders.write(tmp_path / "rows.jsonl", builders.rows(90))
    config = make(train=str(data), workers=1)
    prepare(config, tmp_path / "whole")
    monkeypatch.setattr(row_encoder, "CHUNK_TOKENS", 60)
    monkeypatch.setattr(row_encoder, "_BATCH_ROWS", 7)
    config = make(train=str(data), workers=1, cache=str(tmp_path / "c2"))
    summary = prepare(config, tmp_path / "chunks")
    assert summary == Summary.read(tmp_path / "whole")
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file():
            relative = file.relative_to(tmp_path / "whole")
            assert file.read_bytes() == (tmp_path / "chunks" / relative).read_bytes(), relative


class _Odd(Exception):
    def __init__(self, *, name: str) -> None:
        super().__init__(name)


def test_an_answer_that_cannot_be_read_is_an_error(
    make: Any, builders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an exception whose constructor needs keywords: reading it back fails."""
    data = builders.write(tmp_path / "rows.jsonl", builders.rows(30))
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(_Odd(name="x")))
    monkeypatch.setattr(build, "SMALL_BYTES", 1)
    monkeypatch.setattr(build, "UNIT_BYTES", 700)
    plain = subprocess.Popen
    bad = b"\x80\x05cbuiltins\nint\n(S'x'\ntR."  # int('x')

    def start(command: list[str], **kwargs: Any) -> Any:
        answers = kwargs["pass_fds"][1::2]
        script = f"import os, time; [os.write(fd, {bad!r}) for fd in {answers}]; time.sleep(60)"
        return plain([sys.executable, "-c", script], **kwargs)

    monkeypatch.setattr(workers.subprocess, "Popen", start)
    with pytest.raises(ValueError, match="invalid literal"):
        prepare_cached(make(train=str(data), workers=2))


def test_rows_of_very_many_channels_are_refused(make: Any, builders: Any, tmp_path: Path) -> None:
    many = [builders.chat("q", f"a {i}", f"t{i}") for i in range(300)]
    data = builders.write(tmp_path / "rows.jsonl", many)
    with pytest.raises(DataError, match=r"more than 256 channels(.|\n)*data\.columns"):
        prepare_cached(make(train=str(data)))
