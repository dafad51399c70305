"""The Triton kernels on a real GPU, in one command: `pytest -m gpu tests/kernels`."""

from __future__ import annotations

import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def problem(dtype: torch.dtype, vocabulary: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    labels_N = torch.randint(vocabulary, (300,), generator=random)
    weight_VD = torch.randn(vocabulary, 96, generator=random) / 96**0.5
    hidden_TD = torch.randn(700, 96, generator=random)
    supervised = torch.randperm(700, generator=random)[:300]
    hidden_TD[supervised] += 3 * weight_VD[labels_N]  # peaked, as of a trained model
    tensors = {"hidden_TD": hidden_TD.to(dtype), "weight_VD": weight_VD.to(dtype)}
    channel = torch.randint(3, (300,), generator=random)
    return {**tensors, "labels_N": labels_N, "supervised": supervised, "channel": channel}


def run(tensors: dict[str, torch.Tensor], impl: str, **options: object) -> list[torch.Tensor]:
    tensors = dict(tensors)
    for name in ("hidden_TD", "weight_VD"):
        tensors[name] = tensors[name].detach().clone().requires_grad_()
    result = linear_cross_entropy(
        **tensors, num_channels=3, denominator=300.0, impl=impl, softcap=20.0, z_loss=1e-3,
        entropy=True, **options,
    )  # fmt: skip
    result.loss.backward()
    grads = [tensors["hidden_TD"].grad, tensors["weight_VD"].grad]
    return [result.loss.detach(), result.nll_N, result.channels_C4, result.entropy_N, *grads]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1009, 32000, 50257])
@pytest.mark.parametrize("chunk_rows", [None, 128])
def test_triton_equals_the_truth(
    dtype: torch.dtype, vocabulary: int, chunk_rows: int | None
) -> None:
    tensors = problem(dtype, vocabulary)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    truth = run(wide, "reference")
    there = {name: tensor.cuda() for name, tensor in tensors.items()}
    eager = run(there, "reference")  # float32 inside: only inputs and gradients are rounded
    ours = run(there, "triton", chunk_rows=chunk_rows)
    rounding = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for value, exact, plain in zip(ours, truth, eager, strict=True):
        error = float((value.cpu().double() - exact).norm())
        theirs = float((plain.cpu().double() - exact).norm())
        assert error <= 1.5 * theirs + rounding * float(exact.norm())
    again = run(there, "triton", chunk_rows=chunk_rows)
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


def test_nobody_waits_for_the_device() -> None:
    there = {name: tensor.cuda() for name, tensor in problem(torch.bfloat16, 32000).items()}
    run(there, "triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(there, "triton")
        hidden_TD = there["hidden_TD"].clone().requires_grad_()
        found = linear_logprob(hidden_TD, there["weight_VD"], there["labels_N"],
                               supervised=there["supervised"], entropy=True)  # fmt: skip
        (found.logprob_N.sum() + found.entropy_N.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(hidden_TD.grad.norm()) > 0


def test_a_label_out_of_range_gives_no_number() -> None:
    there = {name: tensor.cuda() for name, tensor in problem(torch.bfloat16, 1009).items()}
    there["labels_N"][5] = 1009
    found = run(there, "triton")
    assert found[0].isnan() and found[1].isnan().nonzero().tolist() == [[5]]
