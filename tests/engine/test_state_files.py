"""What DeepSpeed's engine does around DeepSpeed: what a compiler prints, what a file may hold."""

from __future__ import annotations

import contextlib
import subprocess

import pytest
import torch

from posttrain_dist.engine import AdamW
from posttrain_dist.engine.deepspeed import stderr_of_children
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.engine.state_files import read_state, without_code


def test_what_a_compiler_prints_goes_to_the_log_of_the_rank(tmp_path, capfd):
    """As under cluster=local, where only Python's own stderr is sent to the log."""

    def fail():
        subprocess.run(["sh", "-c", "echo 'collect2: error' >&2"], check=True)

    with (tmp_path / "rank-0.log").open("w") as log, contextlib.redirect_stderr(log):
        with stderr_of_children():
            fail()
        assert capfd.readouterr().err == ""
        fail()  # the terminal is back
    assert capfd.readouterr().err == "collect2: error\n"
    assert (tmp_path / "rank-0.log").read_text() == "collect2: error\n"
    with stderr_of_children():  # and where it is the terminal, it stays that
        fail()
    assert capfd.readouterr().err == "collect2: error\n"


def test_the_plain_reader_is_back_for_others(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = set(torch.serialization.get_safe_globals())
    torch.save({"step": 3, "limit": range(2)}, tmp_path / "x.pt")
    with without_code([range]):
        assert read_state(tmp_path / "x.pt", types=[range])["step"] == 3
    with pytest.warns(UserWarning, match="NO_WEIGHTS_ONLY"):
        assert torch.load(tmp_path / "x.pt")["limit"] == range(2)
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_state_is_taken_from_the_file_tensor_by_tensor(tmp_path, monkeypatch):
    """A run that fills its GPU goes on there: weights and moments are never all there twice."""

    def trained(dtype):
        model = torch.nn.Linear(64, 64).to(dtype)
        engine = SingleEngine(AdamW(), torch.device("cpu"))
        engine.attach(model)
        return model, engine

    for dtype in (torch.float32, torch.bfloat16):
        model, engine = trained(dtype)
        model(torch.ones(1, 64, dtype=dtype)).sum().backward()
        engine.step(1e-2)
        engine.save_state(tmp_path)
        asked = []

        def load(*args, load=torch.load, asked=asked, **options):
            asked.append((options["mmap"], str(options["map_location"])))
            return load(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "load", load)
            other, second = trained(dtype)
            second.load_state(tmp_path)
        assert asked == [(True, "cpu")]
        file = (tmp_path / "single.pt").read_bytes()
        (tmp_path / "single.pt").write_bytes(bytes(len(file)))  # what was read is no view of it
        for (_, ours), (_, theirs) in zip(engine.named_state(), second.named_state(), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert torch.equal(other.weight, model.weight)
