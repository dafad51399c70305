"""What DeepSpeed's engine does around DeepSpeed: what a compiler prints, what a file may hold."""

from __future__ import annotations

import contextlib
import subprocess

import pytest
import torch

from posttrain_dist.engine.deepspeed import stderr_of_children
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
