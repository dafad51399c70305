"""Files and folders that are written whole or not at all, and digests made while writing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import xxhash

from posttrain_dist.files import (
    DigestWriter,
    FileDigest,
    commit_folder,
    digest_of,
    partial_of,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_reader_of_a_file_that_is_replaced_keeps_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with path.open() as reader:  # what is renamed over stays as it is; what is written over not
        write_atomic(path, "new", to_disk=True)
        assert reader.read() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.json"]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_a_folder_gets_its_name_at_once_and_only_where_there_is_room(tmp_path):
    folder = tmp_path / "out"
    partial = partial_of(folder)
    (partial / "in").mkdir(parents=True)
    (partial / "in" / "x").write_text("new")
    inode = (partial / "in" / "x").stat().st_ino
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(OSError, match="not empty"):
        commit_folder(partial, folder)
    assert names(folder) == ["old"] and names(partial) == ["in"]
    commit_folder(partial, folder, replace=True)
    assert (folder / "in" / "x").stat().st_ino == inode  # renamed, not copied
    assert names(tmp_path) == ["out"] and names(folder) == ["in"]
    partial.mkdir()
    (folder / "in" / "x").unlink()
    (folder / "in").rmdir()
    commit_folder(partial, folder)  # in the place of an empty one
    assert names(tmp_path) == ["out"]


def test_a_digest_made_while_writing_is_that_of_the_file(tmp_path):
    state = {"w": torch.randn(70_000, 3), "step": 7, "b": torch.ones(5, dtype=torch.bfloat16)}
    with DigestWriter(tmp_path / "state.pt") as file:
        torch.save(state, file)
    content = (tmp_path / "state.pt").read_bytes()
    assert file.digest == FileDigest(len(content), xxhash.xxh3_128_hexdigest(content))
    assert file.digest == digest_of(tmp_path / "state.pt")
    read_back = torch.load(tmp_path / "state.pt", mmap=True, weights_only=True)
    assert torch.equal(read_back["w"], state["w"]) and read_back["step"] == 7


def test_a_digest_writer_refuses_to_write_over_what_is_in_its_digest(tmp_path):
    with DigestWriter(tmp_path / "x") as file:
        assert file.write(memoryview(torch.arange(3, dtype=torch.int32).numpy())) == 12
        with pytest.raises(io.UnsupportedOperation):
            file.seek(0)
    assert file.digest == digest_of(tmp_path / "x")
    assert file.digest.bytes == 12


def test_deepspeed_writes_through_a_digest(tmp_path):
    from posttrain_dist.engine.deepspeed import _record_digests, import_deepspeed

    import_deepspeed()
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    writer = TorchCheckpointEngine()
    written = _record_digests(writer)
    for name in ("a.pt", "b.pt"):
        writer.save(state_dict={"w": torch.arange(9)}, path=str(tmp_path / name))
    assert written == {path: digest_of(path) for path in (tmp_path / "a.pt", tmp_path / "b.pt")}
    assert torch.equal(writer.load(str(tmp_path / "a.pt"))["w"], torch.arange(9))
