"""The head split over the vocabulary on real gloo processes, against the whole head."""

from __future__ import annotations

import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("head_cases.py"))))
WORKER = Path(__file__).parents[1] / "workers" / "vocab_parallel.py"


def ranks(problem: Path, world: int, impl: str) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = [problem.with_name(f"{rank}.pt") for rank in range(world)]
    commands = [
        [sys.executable, WORKER, str(rank), str(world), str(port), impl, problem, results[rank]]
        for rank in range(world)
    ]
    running = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * world, errors
    return [torch.load(result, weights_only=True) for result in results]


@pytest.mark.parametrize(
    ("impl", "edges"),
    [("torch", [0, 90, 203]), ("triton", [0, 90, 203]), ("torch", [0, 3, 4, 203])],
)
def test_ranks_that_share_the_vocabulary_equal_one(
    impl: str, edges: list[int], tmp_path: Path
) -> None:
    """Uneven shares; labels in each of them; a scale, a softcap, a z-loss, weights and entropy."""
    case = cases.make_case(0.3, 12, softcap=6.0, logit_scale=0.7, z_loss=0.02)
    case.labels_N[0], case.labels_N[1], case.labels_N[2] = 0, 202, -100
    case = case.in_dtype(torch.float64)
    both = {"supervised": case.supervised, "softcap": 6.0, "logit_scale": 0.7, "chunk_rows": 3}
    only_loss = {"token_weight": case.token_weight, "channel": case.channel, "num_channels": 5}
    only_loss |= {"denominator": case.denominator, "z_loss": 0.02}
    factor_N = torch.linspace(-1, 2, len(case.labels_N), dtype=torch.float64)
    tensors = {"hidden_TD": case.hidden_TD.detach(), "weight_VD": case.weight_VD.detach()}
    problem = {**tensors, "labels_N": case.labels_N, "factor_N": factor_N, "edges": edges}
    torch.save({**problem, "both": both, "only_loss": only_loss}, tmp_path / "problem.pt")

    wanted = {}
    result = case.head(impl="reference", entropy=True)
    result.loss.backward()
    wanted["loss"] = (result, case.hidden_TD.grad, case.weight_VD.grad)
    case = case.in_dtype(torch.float64)
    result = case.logprob(impl="reference", entropy=True)
    (result.logprob_N * factor_N + result.entropy_N * 0.3).sum().backward()
    wanted["logprob"] = (result, case.hidden_TD.grad, case.weight_VD.grad)

    for rank, found in enumerate(ranks(tmp_path / "problem.pt", len(edges) - 1, impl)):
        for name, (outputs, hidden_TD, weight_VD) in found.items():
            truth, whole_TD, whole_VD = wanted[name]
            for ours, exact in zip(outputs, truth, strict=True):
                torch.testing.assert_close(ours, exact.detach())
            torch.testing.assert_close(hidden_TD, whole_TD)
            torch.testing.assert_close(weight_VD, whole_VD[edges[rank] : edges[rank + 1]])


def test_uneven_parts_are_cut_alike(tmp_path: Path) -> None:
    """Each chunk ends in a collective: a rank with few rows of the weight cuts no larger ones."""
    case = cases.make_case(0, rows=512, width=2, vocabulary=100_300).in_dtype(torch.float32)
    tensors = {"hidden_TD": case.hidden_TD.detach(), "weight_VD": case.weight_VD.detach()}
    problem = {**tensors, "labels_N": case.labels_N, "edges": [0, 100_000, 100_300]}
    problem |= {"factor_N": torch.ones(512), "both": {}, "only_loss": {"denominator": 512.0}}
    torch.save(problem, tmp_path / "problem.pt")
    wanted = cases.linear_cross_entropy(
        case.hidden_TD, case.weight_VD, case.labels_N, denominator=512.0
    )
    wanted.loss.backward()
    for found in ranks(tmp_path / "problem.pt", 2, "torch"):
        outputs, hidden_TD, _ = found["loss"]
        torch.testing.assert_close(outputs[0], wanted.loss.detach())
        torch.testing.assert_close(hidden_TD, case.hidden_TD.grad, rtol=1e-4, atol=1e-8)
