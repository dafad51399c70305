"""The fused output head against a float64 truth, and no worse than eager torch in its dtype."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from grids import grid
from posttrain_kernels import linear_cross_entropy

cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("head_cases.py"))))
assert_as_good_as_eager, make_case = cases.assert_as_good_as_eager, cases.make_case
eager, fused = cases.eager, cases.fused
GRADIENTS, PER_TOKEN = cases.GRADIENTS, cases.PER_TOKEN

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUSED = ["torch", "triton"]
NUM_ROWS = {"torch": 61, "triton": 12, "reference": 61}  # Triton's interpreter takes 10 ms a row


@grid(dtype=DTYPES, masked=[0, 0.5, 0.75, 0.9, 1], chunk_rows=[None, 1, 7, 64], impl=FUSED)
def test_error_is_at_most_that_of_eager(
    dtype: torch.dtype, masked: float, chunk_rows: int | None, impl: str
) -> None:
    case = make_case(masked, NUM_ROWS[impl])
    assert_as_good_as_eager(case, dtype, chunk_rows=chunk_rows, impl=impl)


@grid(
    dtype=DTYPES,
    bias=[False, True],
    softcap=[None, 3.0],
    logit_scale=[1.0, 0.0625, 1.5],
    impl=["torch", "triton", "reference"],
)
def test_shaped_logits(
    dtype: torch.dtype, bias: bool, softcap: float | None, logit_scale: float, impl: str
) -> None:
    options = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "z_loss": 0.01}
    case = make_case(rows=NUM_ROWS[impl], **options)
    assert_as_good_as_eager(case, dtype, impl=impl, chunk_rows=8)


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(1, 1, 2), (2, 3, 1), (17, 130, 1009), (5, 7, 4099)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", FUSED)
def test_odd_shapes(rows: int, width: int, vocabulary: int, dtype: torch.dtype, impl: str) -> None:
    case = make_case(0, rows, width, vocabulary)
    assert_as_good_as_eager(case, dtype, chunk_rows=16, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("masked", [0, 0.5])
def test_the_label_minus_100_asks_for_nothing(impl: str, masked: float) -> None:
    """Like rows that are not supervised: no loss, no gradient, no count, whatever their weight."""
    case = make_case(masked, NUM_ROWS[impl], z_loss=0.01)
    none_N = torch.arange(len(case.labels_N)) % 3 == 0
    case.labels_N = case.labels_N.masked_fill(none_N, -100)
    assert_as_good_as_eager(case, torch.float32, impl=impl)
    kept = {name: getattr(case, name) for name in PER_TOKEN if getattr(case, name) is not None}
    without = replace(case, **{name: value[~none_N] for name, value in kept.items()})
    if case.supervised is None:
        without.supervised = (~none_N).nonzero()[:, 0]
    ours, wanted = case.head(impl=impl, entropy=True), without.head(impl=impl, entropy=True)
    torch.testing.assert_close(ours.channels_C4, wanted.channels_C4)
    torch.testing.assert_close(ours.nll_N[~none_N], wanted.nll_N)
    torch.testing.assert_close(ours.entropy_N[~none_N], wanted.entropy_N)
    assert (ours.nll_N[none_N] == 0).all() and not ours.correct_N[none_N].any()


def test_float16_gradients_survive_a_large_denominator() -> None:
    """Divided by 1e6 before it is summed, a gradient of this size would be 0 in float16."""
    case = make_case(0.2).in_dtype(torch.float16)
    case.denominator = 1e6
    loss_scale = 2.0**16  # as a scaler of mixed precision does it
    (case.head().loss * loss_scale).backward()
    exact = replace(case).in_dtype(torch.float64)
    (exact.head().loss * loss_scale).backward()
    for name in ("hidden_TD", "weight_VD"):
        ours, wanted = getattr(case, name).grad.double(), getattr(exact, name).grad
        assert float((ours - wanted).norm()) < 2e-3 * float(wanted.norm()), name


def test_a_denominator_on_the_device_is_the_same_number() -> None:
    case = make_case()
    wanted, as_tensor = fused(case, torch.float32), replace(case)
    as_tensor.denominator = torch.tensor(case.denominator, dtype=torch.float64)
    for name, value in fused(as_tensor, torch.float32).items():
        assert torch.equal(value, wanted[name]), name


def test_bfloat16_gradients_of_many_chunks_are_added_up_in_float32() -> None:
    assert_as_good_as_eager(make_case(0, 2000, 8, 11), torch.bfloat16, chunk_rows=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_products_in_16_bits_or_widened_block_by_block(
    dtype: torch.dtype, fast: bool, chunk_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of a CPU, whichever this one has; the weight in blocks of 5 rows."""
    monkeypatch.setattr("posttrain_kernels.passes.matmuls.multiplies_fast", lambda _: fast)
    monkeypatch.setattr("posttrain_kernels.passes.matmuls.BLOCK_ELEMENTS", 100)
    assert_as_good_as_eager(make_case(bias=True), dtype, chunk_rows=chunk_rows)


def test_strips_inside_a_chunk_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain_kernels.passes.torch_kernels.STRIP_ELEMENTS_CPU", 500)
    assert_as_good_as_eager(make_case(bias=True, softcap=4.0), torch.bfloat16)


@pytest.mark.parametrize("impl", FUSED)
def test_huge_logits_stay_finite(impl: str) -> None:
    """The label's probability underflows in float32, its loss does not."""
    case = make_case(rows=NUM_ROWS[impl])
    case.hidden_TD = case.hidden_TD * 100
    assert_as_good_as_eager(case, torch.float32, impl=impl)
    assert fused(case, torch.float32, impl=impl)["nll"].max() > 200


@pytest.mark.parametrize("impl", FUSED)
def test_tokens_that_cannot_be(impl: str) -> None:
    """A bias of -inf, first in the row and for a whole block of Triton's: probability 0."""
    case = make_case(0, rows=3, vocabulary=5000, bias=True)
    case.labels_N = case.labels_N % 500 + 4200
    case.bias[:4150] = float("-inf")
    ours, exact = case.in_dtype(torch.float32), case.in_dtype(torch.float64)
    result, wanted = ours.head(impl=impl, entropy=True), exact.head(impl="reference", entropy=True)
    torch.testing.assert_close(result.entropy_N.double(), wanted.entropy_N, rtol=1e-5, atol=1e-5)
    result.loss.backward(), wanted.loss.backward()
    for name in ("hidden_TD", "weight_VD"):
        grad, exact_grad = getattr(ours, name).grad, getattr(exact, name).grad
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6)


def test_loss_does_not_depend_on_chunks() -> None:
    case = make_case(0, rows=257, vocabulary=509)
    losses = [float(case.head(chunk_rows=n).loss.double()) for n in (1, 3, 64, 100, 257)]
    assert max(losses) - min(losses) <= 1e-7 * losses[0]


@pytest.mark.parametrize("weighting", ["no row", "weights 0", "weights 0, no weight anywhere"])
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_nothing_supervised_is_exactly_zero(weighting: str, impl: str) -> None:
    case = make_case(1 if weighting == "no row" else 0.5, bias=True)
    case.token_weight = torch.zeros_like(case.token_weight)
    if weighting != "weights 0":
        case.denominator = 0.0
    for name, value in fused(case, torch.float32, impl=impl).items():
        if name != "nll":
            assert torch.equal(value, torch.zeros_like(value)), name


@grid(softcap=[None, 2.0], chunk_rows=[2, None], impl=FUSED)
def test_gradcheck(softcap: float | None, chunk_rows: int | None, impl: str) -> None:
    case = make_case(
        0.4, rows=5, width=2, vocabulary=3, bias=True, softcap=softcap, logit_scale=0.7, z_loss=0.1
    ).in_dtype(torch.float64)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(GRADIENTS, tensors, strict=True))
        return 3 * replace(case, **named).head(chunk_rows=chunk_rows, impl=impl).loss

    assert torch.autograd.gradcheck(loss, (case.hidden_TD, case.weight_VD, case.bias))


# --------------------------------------------------------------------------- weights, channels


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_channel_table_is_a_scatter_add(impl: str) -> None:
    # Positive logits of a token's own direction make about half of the labels right.
    case = make_case(0.2, rows=30, width=64)
    assert case.supervised is not None
    nearest_N = (case.hidden_TD[case.supervised] @ case.weight_VD.T).argmax(dim=1)
    case.labels_N = torch.where(torch.arange(len(nearest_N)) % 2 == 1, nearest_N, case.labels_N)
    nll_N = eager(case, torch.float64)["nll"]
    wanted_C4 = torch.zeros(5, 4, dtype=torch.float64)
    for i, (channel, weight) in enumerate(zip(case.channel, case.token_weight, strict=True)):
        row = (nll_N[i] * weight, weight, nearest_N[i] == case.labels_N[i], 1)
        if weight > 0:
            wanted_C4[channel] += torch.tensor([float(value) for value in row])

    result = case.head(impl=impl)
    torch.testing.assert_close(result.channels_C4.double(), wanted_C4, rtol=1e-6, atol=1e-9)
    assert 0 < wanted_C4[0, 2] < wanted_C4[0, 3] and (wanted_C4[4] == 0).all()
    total = float(result.channels_C4[:, 0].double().sum()) / case.denominator
    assert total == pytest.approx(float(result.loss), rel=1e-6)
    assert not result.channels_C4.requires_grad and not result.nll_N.requires_grad


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_correct_means_that_no_token_exceeds_the_label(impl: str) -> None:
    """Logits of every row: 1, 1.001, 1.001. The first label just loses, a tie is right."""
    weight_V1 = torch.tensor([[1.0], [1.001], [1.001]])
    labels_N, one_channel = torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64)
    result = linear_cross_entropy(
        torch.ones(3, 1), weight_V1, labels_N, impl=impl, denominator=3, channel=one_channel,
        num_channels=1,
    )  # fmt: skip
    nll = -torch.log_softmax(weight_V1[:, 0].double(), dim=0).sum()
    assert result.channels_C4.tolist() == [[pytest.approx(float(nll)), 3, 2, 3]]


def test_rows_of_weight_0_contribute_nothing() -> None:
    case = make_case()
    assert case.supervised is not None
    case.token_weight[::3] = 0
    kept = case.token_weight > 0
    without = replace(case, **{name: getattr(case, name)[kept] for name in PER_TOKEN})
    with_zeros, dropped = fused(case, torch.float32), fused(without, torch.float32)
    for name in ("loss", "hidden_TD", "weight_VD"):
        torch.testing.assert_close(with_zeros[name], dropped[name], rtol=1e-6, atol=1e-9)
    assert (with_zeros["hidden_TD"][case.supervised[~kept]] == 0).all()
    assert torch.equal(case.head().channels_C4, without.head().channels_C4)


def test_micro_batches_add_up_to_the_whole() -> None:
    case = make_case(0.3, rows=64)
    whole = case.in_dtype(torch.float32)
    whole.head().loss.backward()
    parts = case.in_dtype(torch.float32)
    loss, table_C4 = 0.0, torch.zeros(5, 4)
    for rows in torch.arange(len(case.labels_N)).split(13):
        part = replace(parts, **{name: getattr(case, name)[rows] for name in PER_TOKEN})
        result = part.head()
        result.loss.backward()
        loss += float(result.loss.detach())
        table_C4 += result.channels_C4
    assert loss == pytest.approx(float(whole.head().loss.detach()), rel=3e-7)
    torch.testing.assert_close(table_C4, whole.head().channels_C4, rtol=1e-6, atol=0)
    for name in ("hidden_TD", "weight_VD"):
        ours, wanted = getattr(parts, name).grad, getattr(whole, name).grad
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", FUSED)
def test_a_row_supervised_twice_counts_twice(impl: str) -> None:
    case = make_case(0.5, NUM_ROWS[impl])
    assert case.supervised is not None
    case.supervised[1:4] = case.supervised[0]
    case.token_weight[:4] = 1
    assert_as_good_as_eager(case, torch.float32, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_entropy_comes_from_the_same_pass(impl: str) -> None:
    case = make_case(rows=NUM_ROWS[impl], softcap=4.0, bias=True)
    log_p_NV = cases.eager_log_p(case.in_dtype(torch.float64))
    wanted_N = -(log_p_NV.exp() * log_p_NV).sum(dim=1).detach()
    result = case.in_dtype(torch.float32).head(impl=impl, entropy=True, chunk_rows=7)
    torch.testing.assert_close(result.entropy_N.double(), wanted_N, rtol=2e-5, atol=2e-5)
    assert not result.entropy_N.requires_grad
    assert case.head(impl=impl).entropy_N is None


@pytest.mark.parametrize("impl", FUSED)
def test_the_same_input_gives_the_same_bits(impl: str) -> None:
    case = make_case(0.2, NUM_ROWS[impl])
    first, second = (fused(case, torch.bfloat16, impl=impl, chunk_rows=5) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_negative_weights_lower_the_loss_but_are_not_counted() -> None:
    case = make_case()
    case.token_weight[::2] *= -1
    assert_as_good_as_eager(case, torch.float32)
    count = float(case.head().channels_C4[:, 3].sum())
    assert count == float((case.token_weight > 0).sum())
