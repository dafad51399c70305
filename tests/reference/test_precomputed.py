"""The pass before step 1: each value at its token, none twice, whatever happens on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_passes import expected, fill, negative_ids, opened, source_of, write_units

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.flow import Batch
from posttrain_dist.reference.kept_log_probs import LOGPROB
from posttrain_dist.reference.precomputed import _values

WORKER = Path(__file__).parents[1] / "workers" / "fill_reference.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_units(tmp_path)
    return tmp_path


def run_pass(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    places = [str(WORKER.parents[1] / "suite"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(WORKER), str(folder), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120
    )


def test_a_killed_pass_goes_on_behind_its_last_whole_part(folder: Path) -> None:
    killed = run_pass(folder, "24", "kill")  # parts of four units, two packs each
    assert killed.returncode == -signal.SIGKILL
    stored, examples = opened(folder)
    assert stored.done().tolist() == [True] * 12 + [False] * 24
    calls: list[Batch] = []

    def score(batch: Batch) -> torch.Tensor:
        calls.append(batch)
        return negative_ids(batch)

    lines = fill(stored, examples, score, 24)
    assert len(calls) == 4
    assert "8 rows, 48 tokens" in lines[0]
    assert np.array_equal(stored.values(), expected(examples), equal_nan=True)
    assert fill(stored, examples, score, 24) == []
    assert len(calls) == 4


def test_examples_hand_the_values_out_at_their_targets(folder: Path) -> None:
    stored, examples = opened(folder)
    some = examples.subset(np.arange(6, 18))
    fill(stored, some, negative_ids, 7)  # a part is one unit at least
    some.add_token_field("ref_logprob_L", stored.values())
    batch = collate([some[i] for i in range(6)])
    found_N = batch.extra["ref_logprob_N"]
    assert found_N[: batch.num_targets].tolist() == [-23.0, -24.0, -25.0, -33.0, -34.0, -35.0]
    assert torch.equal(found_N[batch.num_targets :], torch.zeros(128 - batch.num_targets))
    assert stored.done().sum() == 12


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_a_part(folder: Path, world: int) -> None:
    _, examples = opened(folder)
    cpu = torch.device("cpu")
    found = [
        _values(examples, source_of(examples, rank, world), negative_ids, cpu)
        for rank in range(world)
    ]
    values = np.full(examples.num_stored_tokens, np.nan, np.float32)
    for tokens, own in found:
        assert len(tokens) > 0 and np.isnan(values[tokens]).all()
        values[tokens] = own
    assert np.array_equal(values, expected(examples), equal_nan=True)


def test_what_is_kept_is_taken_by_its_key_and_only_undamaged(folder: Path) -> None:
    stored, examples = opened(folder)
    fill(stored, examples, negative_ids, 100)
    stored.finish(folder / "cached")
    for file in stored.folder.iterdir():
        file.unlink()
    again, _ = opened(folder)  # from the cache
    assert again.done().all()
    assert np.array_equal(again.values(), expected(examples), equal_nan=True)

    values = np.load(again.folder / LOGPROB)
    values[3] += 1e-3
    np.save(again.folder / LOGPROB, values)
    np.save(folder / "cached" / LOGPROB, values)
    damaged, _ = opened(folder)
    assert not damaged.done().any()
    other, _ = opened(folder, key="b")
    assert not other.done().any()
    assert np.isnan(other.values()).all()
