"""The head split over the vocabulary on real gloo processes, against the whole head."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("head_cases.py"))))

# Uneven shares of 203 tokens, and of 100,300.
EDGES = {
    "torch-2": [0, 90, 203],
    "triton-2": [0, 90, 203],
    "torch-3": [0, 3, 4, 203],
    "large-2": [0, 100_000, 100_300],
}


def everything():
    """Labels in each share; a scale, a softcap, a z-loss, weights, channels."""
    case = cases.make_case(0.3, 12, softcap=6.0, logit_scale=0.7, z_loss=0.02)
    case.labels_N[0], case.labels_N[1], case.labels_N[2] = 0, 202, -100
    return case.in_dtype(torch.float64)


def large():
    return cases.make_case(0, rows=512, width=2, vocabulary=100_300).in_dtype(torch.float32)


def problem_of(name: str) -> dict:
    case = large() if name == "large-2" else everything()
    both = {"supervised": case.supervised, "softcap": case.softcap}
    both |= {"logit_scale": case.logit_scale, "chunk_rows": None if name == "large-2" else 3}
    only_loss = {"token_weight": case.token_weight, "channel": case.channel, "num_channels": 5}
    return {
        "impl": "triton" if name == "triton-2" else "torch",
        "edges": EDGES[name],
        "hidden_TD": case.hidden_TD.detach(),
        "weight_VD": case.weight_VD.detach(),
        "labels_N": case.labels_N,
        "factor_N": factor_of(case),
        "both": both,
        "only_loss": only_loss | {"denominator": case.denominator, "z_loss": case.z_loss},
    }


def factor_of(case) -> torch.Tensor:
    return torch.linspace(-1, 2, len(case.labels_N), dtype=case.hidden_TD.dtype)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, run_workers):
    """name -> what each rank got: of the loss and of log-probabilities, outputs and gradients."""
    folder = tmp_path_factory.mktemp("shards")
    for world in (2, 3):
        names = [name for name in EDGES if name.endswith(str(world))]
        for name in names:
            torch.save(problem_of(name), folder / f"{name}.pt")
        run_workers("vocab_parallel.py", world, *(folder / f"{name}.pt" for name in names))
    return {
        name: [
            torch.load(folder / f"{name}.{rank}", weights_only=True)
            for rank in range(len(edges) - 1)
        ]
        for name, edges in EDGES.items()
    }


@pytest.mark.parametrize("name", ["torch-2", "triton-2", "torch-3"])
def test_ranks_that_share_the_vocabulary_equal_one(name: str, ranks) -> None:
    wanted = {}
    case = everything()
    result = case.head(impl="reference", entropy=True)
    result.loss.backward()
    wanted["loss"] = (result, case.hidden_TD.grad, case.weight_VD.grad)
    case = everything()
    result = case.logprob(impl="reference", entropy=True)
    (result.logprob_N * factor_of(case) + result.entropy_N * 0.3).sum().backward()
    wanted["logprob"] = (result, case.hidden_TD.grad, case.weight_VD.grad)

    edges = EDGES[name]
    for rank, found in enumerate(ranks[name]):
        for part, (outputs, hidden_TD, weight_VD) in found.items():
            truth, whole_TD, whole_VD = wanted[part]
            for ours, exact in zip(outputs, truth, strict=True):
                torch.testing.assert_close(ours, exact.detach())
            torch.testing.assert_close(hidden_TD, whole_TD)
            torch.testing.assert_close(weight_VD, whole_VD[edges[rank] : edges[rank + 1]])


def test_uneven_parts_are_cut_alike(ranks) -> None:
    """Each chunk ends in a collective: a rank with few rows of the weight cuts no larger ones."""
    case = large()
    wanted = case.head(impl="torch", entropy=True)
    wanted.loss.backward()
    for found in ranks["large-2"]:
        outputs, hidden_TD, _ = found["loss"]
        torch.testing.assert_close(outputs[0], wanted.loss.detach())
        torch.testing.assert_close(hidden_TD, case.hidden_TD.grad, rtol=1e-4, atol=1e-8)
