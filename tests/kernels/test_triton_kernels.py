"""Triton's kernels apart from their results: what they refuse, and that they build for a GPU."""

from __future__ import annotations

import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from posttrain_kernels import linear_cross_entropy
from posttrain_kernels.passes import dispatch, torch_kernels, triton_kernels

cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("head_cases.py"))))


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where nobody waits to look at what a tensor holds."""
    for place in ("linear_cross_entropy", "linear_logprob", "cross_entropy"):
        monkeypatch.setattr(f"posttrain_kernels.losses.{place}.check_rows", lambda *_: None)
    for place in ("arguments", "linear_logprob"):
        name = f"posttrain_kernels.losses.{place}.select_labelled_rows"
        monkeypatch.setattr(name, lambda _, supervised: (None, supervised))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("label", [203, -1])
def test_a_label_out_of_range_is_never_a_number(unseen: None, impl: str, label: int) -> None:
    case = cases.make_case(0, rows=6).in_dtype(torch.float32)
    case.labels_N[2] = label
    result = case.head(impl=impl, chunk_rows=6)
    result.loss.backward()
    assert result.nll_N.isnan().tolist() == [False, False, True, False, False, False]
    assert result.loss.isnan() and case.hidden_TD.grad[2].isnan().all()
    assert case.hidden_TD.grad[[0, 1, 3, 4, 5]].isfinite().all()
    assert case.logprob(impl=impl).logprob_N.isnan().nonzero().tolist() == [[2]]


def test_a_row_out_of_range_is_never_a_number(unseen: None) -> None:
    case = cases.make_case(0.5, rows=6)
    case.supervised[1] = 6  # behind the last
    assert case.head(impl="triton").nll_N.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_ignored_rows_have_no_entropy_where_they_are_not_dropped(unseen: None, impl: str) -> None:
    """What a CPU leaves out of the work, a GPU works on: the results are the same."""
    case = cases.make_case(0, rows=8).in_dtype(torch.float32)
    case.labels_N[[1, 4]] = -100
    found, wanted = (
        case.logprob(impl=impl, entropy=True),
        case.logprob(impl="reference", entropy=True),
    )
    gradients = []
    for each in (found, wanted):
        case.hidden_TD.grad = None
        (each.logprob_N.sum() + 0.5 * each.entropy_N.sum()).backward()
        gradients.append(case.hidden_TD.grad.clone())
    torch.testing.assert_close(found.entropy_N, wanted.entropy_N, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert found.entropy_N[[1, 4]].tolist() == [0, 0] and (gradients[0][[1, 4]] == 0).all()


def test_a_denominator_of_0_on_the_device_is_no_silence() -> None:
    case = cases.make_case()
    assert case.head(denominator=torch.tensor(0.0)).loss.isnan()
    case.token_weight.zero_()
    assert case.head(denominator=torch.tensor(0.0)).loss == 0


@pytest.mark.parametrize("impl", [torch_kernels, triton_kernels])
def test_scatter_adds_up_and_multiplies(impl) -> None:
    random = torch.Generator().manual_seed(0)
    values_ND = torch.randn(40, 1030, generator=random, dtype=torch.float64)
    rows_N = torch.randint(13, (40,), generator=random)
    wanted_TD = torch.zeros(15, 1030, dtype=torch.float64)
    for row, value_D in zip(rows_N.tolist(), values_ND, strict=True):
        wanted_TD[row] += 0.3 * value_D
    factor = torch.tensor(0.3, dtype=torch.float64)
    ours_TD = impl.scatter(values_ND.clone(), rows_N, 15, factor)
    torch.testing.assert_close(ours_TD, wanted_TD)
    assert (ours_TD[13:] == 0).all()


@pytest.mark.parametrize("impl", [torch_kernels, triton_kernels])
def test_gather_reads_any_layout(impl) -> None:
    values_DT = torch.randn(1030, 9)
    rows_N = torch.tensor([8, 9, 0, 9, 0, 9, 3])[::2]
    assert torch.equal(impl.gather(values_DT.t(), rows_N), values_DT.t()[rows_N])


def test_auto_says_once_why(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._auto.cache_clear()
    with caplog.at_level(logging.INFO, logger="posttrain_kernels"):
        cases.make_case().head()
        cases.make_case().head()
    said = [record.message for record in caplog.records]
    assert said == ["fused cross-entropy: impl=torch, because the input is on a cpu"]


def test_triton_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    labels_N = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="impl='triton' runs on a CPU only with TRITON_INTERPRET"):
        linear_cross_entropy(
            torch.zeros(2, 3), torch.zeros(4, 3), labels_N, denominator=1, impl="triton"
        )


def test_kernels_build_for_an_h100() -> None:
    """Triton's own compiler and ptxas make machine code for sm_90 without a GPU; rows are read
    and written 16 bytes at a time, and no register spills."""
    worker = Path(__file__).parents[1] / "workers" / "build_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, worker], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 7
    for name, spilled_bytes, wide_accesses in lines:
        assert int(spilled_bytes) == 0, name
        assert int(wide_accesses) >= 2, name
