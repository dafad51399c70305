"""The fused output head against a float64 truth written here, and against plain eager torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from posttrain_kernels import HeadLoss, linear_cross_entropy
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

GRADIENTS = ("hidden_TD", "weight_VD", "bias")
PER_TOKEN = ("labels_N", "supervised", "token_weight", "channel")


@dataclass
class Case:
    """One head problem; `arguments` are the keywords of linear_cross_entropy beside tensors."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    labels_N: torch.Tensor
    supervised: torch.Tensor | None
    token_weight: torch.Tensor
    channel: torch.Tensor
    bias: torch.Tensor | None
    denominator: float
    softcap: float | None = None
    logit_scale: float = 1.0
    num_channels: int = 5

    def in_dtype(self, dtype: torch.dtype) -> Case:
        """Fresh leaves, so that gradients of two computations never mix."""
        fresh = {
            name: getattr(self, name).detach().to(dtype, copy=True).requires_grad_()
            for name in GRADIENTS
            if getattr(self, name) is not None
        }
        return replace(self, **fresh)

    def head(self, **options: Any) -> HeadLoss:
        return linear_cross_entropy(**{**vars(self), **options})


def make_case(
    masked: float = 0.5,
    rows: int = 61,
    width: int = 19,
    vocabulary: int = 203,
    bias: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Case:
    """Peaked logits (random ones hide mistakes in rare tokens), uneven weights, one 0 weight."""
    random = torch.Generator().manual_seed(seed)
    num_used = round(rows * (1 - masked))
    weight_N = torch.rand(num_used, generator=random) + 0.1
    weight_N[1:2] = 0
    return Case(
        hidden_TD=torch.randn(rows, width, generator=random).to(dtype),
        weight_VD=torch.randn(vocabulary, width, generator=random).to(dtype),
        labels_N=torch.randint(vocabulary, (num_used,), generator=random),
        supervised=torch.randperm(rows, generator=random)[:num_used] if masked else None,
        token_weight=weight_N,
        channel=torch.randint(4, (num_used,), generator=random),  # channel 4 stays empty
        bias=torch.randn(vocabulary, generator=random).to(dtype) if bias else None,
        denominator=float(weight_N.double().sum()) * 1.7 or 1.0,  # as if other ranks had more
        **options,
    )


def eager(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The plain way: logits in `dtype`, then log-softmax in float32 (float64 for float64)."""
    case = case.in_dtype(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    used_ND = case.hidden_TD if case.supervised is None else case.hidden_TD[case.supervised]
    logits_NV = nn.functional.linear(used_ND, case.weight_VD, case.bias).to(wide)
    logits_NV = logits_NV * case.logit_scale
    if case.softcap is not None:
        logits_NV = case.softcap * torch.tanh(logits_NV / case.softcap)
    nll_N = -torch.log_softmax(logits_NV, dim=1)[torch.arange(len(used_ND)), case.labels_N]
    loss = (nll_N * case.token_weight).sum() / case.denominator
    loss.backward()
    return results(case, loss, nll_N.detach())


def fused(case: Case, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
    case = case.in_dtype(dtype)
    result = case.head(**options)
    result.loss.backward()
    return results(case, result.loss, result.nll_N)


def results(case: Case, loss: torch.Tensor, nll_N: torch.Tensor) -> dict[str, torch.Tensor]:
    gradients = {n: getattr(case, n).grad for n in GRADIENTS if getattr(case, n) is not None}
    return {"loss": loss.detach(), "nll": nll_N, **gradients}


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    assert result is not None, "no gradient was made"
    return float(torch.linalg.vector_norm(result.double() - truth))


def assert_as_good_as_eager(case: Case, dtype: torch.dtype, **options: Any) -> None:
    case = case.in_dtype(dtype)  # the truth starts from the same rounded numbers
    truth, plain = eager(case, torch.float64), eager(case, dtype)
    ours = fused(case, dtype, **options)
    # A few roundings of the result itself; in bfloat16 a gradient is rounded once more.
    slack = {torch.float32: 3e-7, torch.bfloat16: 1e-3}[dtype]
    for name, exact in truth.items():
        wanted = 1.1 * error(plain[name], exact)
        wanted += slack * float(torch.linalg.vector_norm(exact))
        assert error(ours[name], exact) <= wanted, name


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [0, 0.5, 0.9, 1])
@pytest.mark.parametrize("chunk_rows", [None, 1, 7, 64])
def test_error_is_at_most_that_of_eager(
    dtype: torch.dtype, masked: float, chunk_rows: int | None
) -> None:
    assert_as_good_as_eager(make_case(masked), dtype, chunk_rows=chunk_rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.0625, 1.5])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_shaped_logits(
    dtype: torch.dtype, bias: bool, softcap: float | None, logit_scale: float, impl: str
) -> None:
    case = make_case(bias=bias, softcap=softcap, logit_scale=logit_scale)
    assert_as_good_as_eager(case, dtype, impl=impl, chunk_rows=8)


@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 1, 2), (2, 3, 1), (33, 130, 1009)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    assert_as_good_as_eager(make_case(0, rows, width, vocabulary), dtype, chunk_rows=16)


def test_bfloat16_gradients_of_many_chunks_are_added_up_in_float32() -> None:
    assert_as_good_as_eager(make_case(0, 2000, 8, 11), torch.bfloat16, chunk_rows=4)


def test_strips_inside_a_chunk_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain_kernels.chunked.STRIP_ELEMENTS_CPU", 500)
    assert_as_good_as_eager(make_case(bias=True, softcap=4.0), torch.bfloat16)


def test_huge_logits_stay_finite() -> None:
    """The label's probability underflows in float32, its loss does not."""
    case = make_case()
    case.hidden_TD = case.hidden_TD * 100
    assert_as_good_as_eager(case, torch.float32)
    assert fused(case, torch.float32)["nll"].max() > 200


def test_loss_does_not_depend_on_chunks() -> None:
    case = make_case(0, rows=257, vocabulary=509)
    losses = [float(case.head(chunk_rows=n).loss.double()) for n in (1, 3, 64, 100, 257)]
    assert max(losses) - min(losses) <= 1e-7 * losses[0]


@pytest.mark.parametrize("weighting", ["no row", "weights 0", "weights 0, no weight anywhere"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_nothing_supervised_is_exactly_zero(weighting: str, impl: str) -> None:
    case = make_case(1 if weighting == "no row" else 0.5, bias=True)
    case.token_weight = torch.zeros_like(case.token_weight)
    if weighting != "weights 0":
        case.denominator = 0.0
    for name, value in fused(case, torch.float32, impl=impl).items():
        if name != "nll":
            assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_rows", [3, None])
def test_gradcheck(softcap: float | None, chunk_rows: int | None) -> None:
    case = make_case(
        0.4, rows=9, width=4, vocabulary=7, bias=True, softcap=softcap, logit_scale=0.7
    ).in_dtype(torch.float64)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(GRADIENTS, tensors, strict=True))
        return 3 * replace(case, **named).head(chunk_rows=chunk_rows).loss

    assert torch.autograd.gradcheck(loss, (case.hidden_TD, case.weight_VD, case.bias))


# --------------------------------------------------------------------------- weights, channels


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_channel_table_is_a_scatter_add(impl: str) -> None:
    # Positive logits of a token's own direction make about half of the labels right.
    case = make_case(0.2, rows=97, width=64)
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


@pytest.mark.parametrize("impl", ["torch", "reference"])
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


def test_a_row_supervised_twice_counts_twice() -> None:
    case = make_case(0.5)
    assert case.supervised is not None
    case.supervised[1:4] = case.supervised[0]
    case.token_weight[:4] = 1
    assert_as_good_as_eager(case, torch.float32)


def test_negative_weights_lower_the_loss_but_are_not_counted() -> None:
    case = make_case()
    case.token_weight[::2] *= -1
    assert_as_good_as_eager(case, torch.float32)
    count = float(case.head().channels_C4[:, 3].sum())
    assert count == float((case.token_weight > 0).sum())


# --------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("frozen", GRADIENTS)
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    case = make_case(bias=True)
    wanted, part = fused(case, torch.float32), case.in_dtype(torch.float32)
    getattr(part, frozen).requires_grad_(False)
    part.head().loss.backward()
    assert getattr(part, frozen).grad is None
    for name in set(GRADIENTS) - {frozen}:
        assert torch.equal(getattr(part, name).grad, wanted[name])


@pytest.mark.parametrize(("products", "mode"), [(1, "no grad"), (2, "frozen"), (3, "trainable")])
def test_work_is_that_of_the_supervised_rows(products: int, mode: str) -> None:
    """Logits, gradient of hidden, gradient of weight: 2 N D V operations each, none twice."""
    case = make_case(0.75, rows=64).in_dtype(torch.float32)
    case.weight_VD.requires_grad_(mode == "trainable")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(mode != "no grad"):
        loss = case.head(chunk_rows=16).loss
        if mode != "no grad":
            loss.backward()
    assert counter.get_total_flops() == products * 2 * 16 * 19 * 203


def test_no_grad_makes_the_same_numbers_and_no_gradient() -> None:
    case = make_case(bias=True, softcap=5.0).in_dtype(torch.bfloat16)
    trained = case.head()
    with torch.no_grad():
        evaluated = case.head()
    assert not evaluated.loss.requires_grad
    assert torch.equal(evaluated.loss, trained.loss) and torch.equal(evaluated.nll_N, trained.nll_N)
    assert torch.equal(evaluated.channels_C4, trained.channels_C4)


def test_inputs_are_left_as_they_were() -> None:
    case = make_case(0, bias=True)
    before = {k: v.clone() for k, v in vars(case).items() if isinstance(v, torch.Tensor)}
    fused(case, torch.float32)
    case.head()
    for name, value in before.items():
        assert torch.equal(getattr(case, name), value), name


def test_non_contiguous_inputs() -> None:
    case = make_case(0, bias=True).in_dtype(torch.float32)
    wanted = fused(case, torch.float32)
    hidden_DT = case.hidden_TD.detach().t().contiguous().requires_grad_()
    weight_DV = case.weight_VD.detach().t().contiguous().requires_grad_()
    replace(case, hidden_TD=hidden_DT.t(), weight_VD=weight_DV.t()).head().loss.backward()
    assert hidden_DT.grad is not None and weight_DV.grad is not None
    torch.testing.assert_close(hidden_DT.grad.t(), wanted["hidden_TD"])
    torch.testing.assert_close(weight_DV.grad.t(), wanted["weight_VD"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_tied_weights_under_activation_checkpointing(reentrant: bool) -> None:
    """The embedding is the head; both parts of its gradient arrive, recomputed or not."""
    case = make_case(0.5)
    tokens_T = torch.randint(203, (61,), generator=torch.Generator().manual_seed(3))

    def gradient(impl: str, recompute: bool) -> torch.Tensor:
        embedding = nn.Embedding.from_pretrained(case.weight_VD, freeze=False)

        def loss(hidden_TD: torch.Tensor) -> torch.Tensor:
            tied = replace(case, hidden_TD=hidden_TD.tanh(), weight_VD=embedding.weight)
            return tied.head(impl=impl).loss

        hidden_TD = embedding(tokens_T)
        if recompute:
            checkpoint(loss, hidden_TD, use_reentrant=reentrant).backward()
        else:
            loss(hidden_TD).backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    wanted = gradient("reference", recompute=False)
    torch.testing.assert_close(gradient("torch", recompute=True), wanted, rtol=1e-5, atol=1e-7)


def test_weight_may_be_gone_by_backward() -> None:
    """ZeRO-3 gathers a parameter for the forward of its module and frees it afterwards."""
    case = make_case()
    wanted, case = fused(case, torch.float32), case.in_dtype(torch.float32)
    head = nn.Parameter(case.weight_VD.detach().clone())
    loss = replace(case, weight_VD=head).head().loss
    shape = head.shape
    head.data.fill_(float("nan"))
    head.data = torch.empty(0)
    gradients = torch.autograd.grad(loss, (case.hidden_TD, head))
    assert gradients[1].shape == shape
    assert torch.equal(gradients[0], wanted["hidden_TD"])
    assert torch.equal(gradients[1], wanted["weight_VD"])


def test_autocast_computes_in_its_dtype() -> None:
    case = make_case(bias=True).in_dtype(torch.float32)
    low = fused(case, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = case.head()
    result.loss.backward()
    assert torch.equal(result.loss.detach(), low["loss"])
    assert case.weight_VD.grad is not None and case.weight_VD.grad.dtype == torch.float32
    assert torch.equal(case.weight_VD.grad, low["weight_VD"].float())
