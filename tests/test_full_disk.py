"""A disk that takes no more: training goes on where nothing is lost, and else says what to do."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from posttrain_dist.checkpoint import store
from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.errors import CheckpointError, PosttrainError
from posttrain_dist.files import DigestWriter, LineFile, read_rows, saved_bytes
from posttrain_dist.logs import NOTICES
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses what makes a file longer: a full disk in all but the number of the error.

    As on a full disk, a write takes what there is room for and the next one fails.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --------------------------------------------------------------------------- files that grow


def test_lines_that_are_refused_come_later_in_their_order(tmp_path: Path) -> None:
    faults: list[OSError] = []
    file = LineFile(tmp_path / "a", ["0" * 9], faults.append)
    with largest_file(25):
        for digit in "123":
            file.append(digit * 9)
        assert (tmp_path / "a").stat().st_size == 25  # a line is cut
    assert [error.strerror for error in faults] == ["File too large"]  # said once
    file.append("4" * 9)
    assert (tmp_path / "a").read_text().split() == [digit * 9 for digit in "01234"]
    with largest_file(50):
        file.append("5" * 9)
    assert len(faults) == 2  # it begins again
    file.close()
    assert (tmp_path / "a").read_text().split()[-1] == "5" * 9


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_is_gone_is_written_again(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    file = LineFile(path, ["ä"])
    file.append("b")
    path.unlink()
    if how == "replaced":
        path.write_text("of somebody else\n")
    file.append("c")
    assert path.read_text(encoding="utf-8").split() == ["ä", "b", "c"]
    path.unlink()
    file.close()  # also without another line
    assert path.read_text(encoding="utf-8").split() == ["ä", "b", "c"]


def test_what_is_refused_to_the_end_is_found_by_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "a"
    file = LineFile(path, ["1", "2"])
    with largest_file(3):
        file.append("33")
        with pytest.raises(OSError, match="File too large"):
            file.close()
        assert path.read_bytes() == b"1\n2\n"
    # The limit holds for the file beside it too: here it had room.
    assert saved_bytes(path) == b"1\n2\n33\n"
    LineFile(path, saved_bytes(path).decode().splitlines()).close()
    assert path.read_bytes() == b"1\n2\n33\n"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


# ------------------------------------------------------------------------------ while training


@pytest.fixture(scope="module")
def prepared(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory):
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            train=TrainConfig(steps=4, batch_size=1, save_every=4),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    folder = tmp_path_factory.mktemp("prepared") / "prepared"
    prepare(config, folder)
    return config, folder


def run_folder(tmp_path: Path, prepared: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "prepared").symlink_to(prepared)
    return folder


def at_step(number: int, act, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something happen while a run trains."""
    plain, steps = SingleEngine.step, []

    def step(engine, lr):
        steps.append(lr)
        if len(steps) == number:
            act()
        return plain(engine, lr)

    monkeypatch.setattr(SingleEngine, "step", step)


def test_files_removed_while_training_are_whole_at_the_end(prepared, tmp_path, monkeypatch):
    config, data = prepared
    folder = run_folder(tmp_path, data)
    names = ("metrics.jsonl", "samples.log", "logs/alarms.jsonl")
    at_step(3, lambda: [(folder / name).unlink() for name in names], monkeypatch)
    train(config, folder)
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    samples = (folder / "samples.log").read_text().splitlines()
    assert [line.split("\t")[0] for line in samples] == ["1", "2", "3", "4"]
    assert (folder / "logs" / "alarms.jsonl").is_file()


def test_metrics_that_cannot_be_written_end_the_run_saved_and_come_back(
    prepared, tmp_path, monkeypatch
):
    config, data = prepared
    folder = run_folder(tmp_path, data)
    metrics = folder / "metrics.jsonl"
    at_step(2, lambda: (metrics.unlink(), metrics.mkdir()), monkeypatch)
    with pytest.raises(PosttrainError, match="cannot be written: is a directory") as caught:
        train(config, folder)
    assert caught.value.where == str(metrics) and "goes on from its newest" in caught.value.fix
    assert [path.name for path in store.whole_checkpoints(folder)] == ["step-000004"]
    assert not (folder / "logs" / "outcome.json").exists()
    (told,) = [json.loads(line)["text"] for line in (folder / NOTICES).read_text().splitlines()]
    assert told.startswith("metrics.jsonl cannot be written: is a directory; training goes on")
    with pytest.raises(PosttrainError, match="cannot be written: is a directory"):
        train(config, folder)  # still: refused before a step, and nothing is lost
    metrics.rmdir()
    train(config, folder)
    assert [row["step"] for row in read_rows(metrics)] == [0, 1, 2, 3, 4]
    assert json.loads((folder / "logs" / "outcome.json").read_text())["outcome"] == "completed"


def test_a_full_disk_is_named_where_a_save_meets_it(prepared, tmp_path, monkeypatch):
    config, data = prepared
    folder = run_folder(tmp_path, data)
    with largest_file(20_000), pytest.raises(CheckpointError) as caught:
        train(replace(config, train=replace(config.train, save_every=2)), folder)
    assert "step 2 cannot be written: file too large" in str(caught.value)
    assert "unexpected pos" not in str(caught.value) and "free space" in caught.value.fix
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [0, 1, 2]
    # The same of an export, whose writer is another.
    from posttrain_dist.checkpoint.hf_folder import RunFacts, write_hf_folder

    weights = [("w", torch.ones(50_000))]
    with largest_file(20_000), pytest.raises(CheckpointError) as caught:
        write_hf_folder(
            weights, Path(config.model.path), tmp_path / "export",
            dtype=torch.float32, facts=RunFacts(),
        )  # fmt: skip
    assert "the model cannot be written" in str(caught.value)
    assert "too large" in str(caught.value).lower() and "posttrain export" in caught.value.fix
    assert not list(tmp_path.glob("export*"))


def test_deepspeed_says_the_same(tmp_path: Path) -> None:
    from posttrain_dist.engine.deepspeed import _record_digests, import_deepspeed

    import_deepspeed()
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    writer = TorchCheckpointEngine()
    _record_digests(writer)
    with largest_file(20_000), pytest.raises(OSError, match="File too large"):
        writer.save(state_dict={"w": torch.ones(50_000)}, path=str(tmp_path / "a.pt"))


def test_a_really_full_device_is_named() -> None:
    with (
        pytest.raises(OSError, match="No space left on device") as raised,
        DigestWriter(Path("/dev/full")) as file,
    ):
        torch.save({"w": torch.ones(50_000)}, file)
    assert raised.value.__cause__ is not raised.value


def test_what_the_disk_refused_is_not_its_own_cause() -> None:
    with (
        pytest.raises(OSError, match="No space left") as raised,
        DigestWriter(Path("/dev/full")) as f,
    ):
        f.write(b"x" * 50_000)
        f.flush()
    assert raised.value.__cause__ is None
