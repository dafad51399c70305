"""The head's benchmark: its inputs are those of a trained model, its truth is the truth."""

import json

import pytest
import torch


def make(masked: float = 0.5, trainable: bool = True, dtype: torch.dtype = torch.float32):
    from head_arms import make_problem, mask

    problem = make_problem(96, 64, 512, trainable=trainable, dtype=dtype, device="cpu")
    return mask(problem, masked)


def by_autograd(problem):
    """Loss and gradients in float64, over all rows with the masked ones ignored."""
    hidden = problem.hidden_ND.detach().double().requires_grad_()
    weight = problem.weight_VD.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden @ weight.T, problem.labels_N)
    loss.backward()
    return loss.item(), hidden.grad, weight.grad


def test_the_mean_loss_is_that_of_a_trained_model():
    from head_arms import make_problem

    problem = make_problem(2048, 256, 8000, trainable=False, dtype=torch.float32, device="cpu")
    loss = torch.nn.functional.cross_entropy(
        problem.hidden_ND.detach() @ problem.weight_VD.T, problem.labels_N
    )
    assert 1 < loss < 2


@pytest.mark.parametrize("masked", [0.0, 0.75])
def test_masks_leave_their_share_and_agree(masked):
    problem = make(masked)
    assert len(problem.supervised) == round(96 * (1 - masked))
    assert torch.equal((problem.labels_N != -100).nonzero()[:, 0], problem.supervised)
    assert torch.equal(problem.labels_N[problem.supervised], problem.targets)


@pytest.mark.parametrize("name", ["ours", "ours, 8 channels", "eager, gathered"])
def test_an_arm_is_right_and_an_error_is_seen(name):
    from head_arms import ARMS, Truth

    problem = make()
    loss, hidden, weight = by_autograd(problem)
    truth = Truth.of(problem)
    assert truth.loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(truth.hidden_ND.double(), hidden, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(truth.weight_VD.double(), weight, atol=1e-7, rtol=1e-4)

    problem.clear()
    errors = truth.errors(ARMS[name]()(problem), problem)
    norm = torch.cat([hidden.flatten(), weight.flatten()]).norm().item()
    assert errors["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert errors["loss_error"] < 1e-6
    assert errors["gradient_error"] < 1e-5

    problem.weight_VD.grad *= 1.01
    assert truth.errors(torch.tensor(loss), problem)["gradient_error"] == pytest.approx(0.01, 0.01)


def test_the_floor_is_the_products_of_the_supervised_rows():
    from head_arms import make_floor
    from torch.utils.flop_counter import FlopCounterMode

    for trainable, products in ((True, 3), (False, 2)):
        floor = make_floor(make(0.75, trainable))
        with FlopCounterMode(display=False) as counter:
            floor()
        assert counter.get_total_flops() == products * 2 * 24 * 64 * 512


def test_what_cannot_run_here_says_why():
    import head

    arms, skipped = head.usable(["eager", "Liger"])
    assert list(arms) == ["eager"]
    if not torch.cuda.is_available():
        assert skipped == {"Liger": "Liger runs its kernels on a GPU only"}


def test_memory_is_what_a_method_adds(monkeypatch, capsys):
    """Eager in float32 holds at least its logits and their gradient."""
    import head

    shape = ["--rows=512", "--hidden=64", "--vocabulary=16000", "--masks=0"]
    monkeypatch.setattr("sys.argv", ["head.py", *shape, "--peak-of=eager"])
    head.main()
    found = json.loads(capsys.readouterr().out)
    logits = 512 * 16000 * 4
    assert 1.9 * logits < found["peak_extra_bytes"] < 4.1 * logits
    gradients = (512 * 64 + 16000 * 64) * 4
    assert found["peak_over_inputs_bytes"] - found["peak_extra_bytes"] == gradients
