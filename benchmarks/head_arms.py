"""The output head's problem, its truth, and every arm that solves it: ours, torch, TRL, Liger, CCE.

An arm is a function of a Problem that runs forward and backward once and returns the loss; the
gradients are then in `hidden_ND.grad` and, where the head is trained, `weight_VD.grad`. An arm
that cannot run here raises Skip with the reason, which is kept in its row.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

IGNORED = -100


@dataclass(slots=True, kw_only=True)
class Problem:
    """Inputs of one head: N rows, of which N_s are supervised; V x D weight."""

    hidden_ND: torch.Tensor
    weight_VD: torch.nn.Parameter
    labels_N: torch.Tensor  # -100 where masked: what the peers take
    supervised: torch.Tensor  # indices of the N_s rows: what a collator of ours ships
    targets: torch.Tensor  # labels of those rows

    @property
    def gradient_bytes(self) -> int:
        """Size of the gradients that the caller asked for."""
        asked = (x for x in (self.hidden_ND, self.weight_VD) if x.requires_grad)
        return sum(x.numel() * x.element_size() for x in asked)

    def clear(self) -> None:
        """Drop the gradients, as an optimizer's zero_grad does."""
        self.hidden_ND.grad = self.weight_VD.grad = None


class Skip(Exception):
    """An arm cannot run here; says why."""


def make_problem(
    rows: int,
    hidden_size: int,
    vocabulary: int,
    *,
    trainable: bool,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> Problem:
    """Unmasked, with logits as a trained model has them: h = alpha * W[target] + noise.

    alpha differs between rows, so that some tokens are easy and some are hard, as those of text
    are; the mean loss is 1 to 2.
    """
    draw = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    weight_VD = normal(vocabulary, hidden_size).mul_(hidden_size**-0.5)
    labels_N = torch.randint(vocabulary, (rows,), generator=draw, device=device)
    # With |W[v]| = 1 and noise of variance 1 a coordinate, logits are alpha on the target and
    # N(0, 1) elsewhere, whose log-sum-exp is log V + 1/2: there the target has half of the mass.
    alpha_N1 = math.log(vocabulary) + 0.5 + 2.0 * normal(rows, 1)
    hidden_ND = alpha_N1 * weight_VD[labels_N] + normal(rows, hidden_size)
    return Problem(
        hidden_ND=hidden_ND.to(dtype).requires_grad_(),
        weight_VD=torch.nn.Parameter(weight_VD.to(dtype), requires_grad=trainable),
        labels_N=labels_N,
        supervised=torch.arange(rows, device=device),
        targets=labels_N,
    )


def mask(problem: Problem, masked: float, seed: int = 0) -> Problem:
    """An unmasked problem with a share of its rows masked; the tensors are shared."""
    rows = len(problem.labels_N)
    draw = torch.Generator(problem.labels_N.device).manual_seed(seed)
    order = torch.randperm(rows, generator=draw, device=problem.labels_N.device)
    supervised = order[: round(rows * (1 - masked))].sort().values
    labels_N = torch.full_like(problem.labels_N, IGNORED)
    labels_N[supervised] = problem.labels_N[supervised]
    targets = problem.labels_N[supervised]
    return replace(problem, labels_N=labels_N, supervised=supervised, targets=targets)


@dataclass(slots=True)
class Truth:
    """The mean loss over supervised rows and its gradients, in float32, 1024 rows at a time."""

    loss: float
    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, problem: Problem) -> Truth:
        weight_VD = problem.weight_VD.detach().float()
        count = len(problem.supervised)
        hidden_ND = torch.zeros_like(problem.hidden_ND, dtype=torch.float32)
        grad_VD = torch.zeros_like(weight_VD) if problem.weight_VD.requires_grad else None
        loss = 0.0
        for rows, labels in zip(
            problem.supervised.split(1024), problem.targets.split(1024), strict=True
        ):
            used_BD = problem.hidden_ND[rows].float()
            logits_BV = used_BD @ weight_VD.T
            log_BV = logits_BV - logits_BV.logsumexp(dim=1, keepdim=True)
            loss -= float(log_BV.gather(1, labels[:, None]).double().sum()) / count
            log_BV.exp_()[torch.arange(len(rows)), labels] -= 1
            log_BV /= count
            hidden_ND[rows] = log_BV @ weight_VD
            if grad_VD is not None:
                grad_VD.addmm_(log_BV.T, used_BD)
        return cls(loss, hidden_ND, grad_VD)

    def errors(self, loss: torch.Tensor, problem: Problem) -> dict[str, float]:
        """Loss, norm of all gradients, and relative errors of what an arm left behind."""
        pairs = [(problem.hidden_ND.grad, self.hidden_ND)]
        if self.weight_VD is not None:
            pairs.append((problem.weight_VD.grad, self.weight_VD))
        norms = [torch.linalg.vector_norm(true).item() for _, true in pairs]
        apart = [(got.float() - true).norm().item() for got, true in pairs if got is not None]
        own = torch.stack([x.grad.float().norm() for x in asked(problem) if x.grad is not None])
        return {
            "loss": loss.item(),
            "loss_error": abs(loss.item() - self.loss) / self.loss,
            "gradient_norm": own.norm().item(),
            "gradient_error": max(a / n for a, n in zip(apart, norms, strict=True)),
        }


def asked(problem: Problem) -> list[torch.Tensor]:
    """The inputs whose gradient is asked for."""
    return [x for x in (problem.hidden_ND, problem.weight_VD) if x.requires_grad]


# -------------------------------------------------------------------------------- arms

Arm = Callable[[Problem], torch.Tensor]


def ours(problem: Problem, channels: int = 0, **options: Any) -> torch.Tensor:
    """posttrain_kernels: supervised rows only, gradients made in the forward."""
    from posttrain_kernels import linear_cross_entropy

    if channels:
        options |= {"channel": problem.targets % channels, "num_channels": channels}
    result = linear_cross_entropy(
        problem.hidden_ND,
        problem.weight_VD,
        problem.targets,
        supervised=problem.supervised,
        denominator=float(len(problem.supervised)),
        **options,
    )
    result.loss.backward()
    return result.loss.detach()


def ours_8_channels(problem: Problem) -> torch.Tensor:
    """The same, with the sums of 8 channels."""
    return ours(problem, channels=8)


def _eager(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(functional.linear(hidden_ND, weight_VD).float(), labels)


def eager(problem: Problem) -> torch.Tensor:
    """What a transformers model does: all rows, float32 logits, masked ones ignored."""
    loss = _eager(problem.hidden_ND, problem.weight_VD, problem.labels_N)
    loss.backward()
    return loss.detach()


def eager_gathered(problem: Problem) -> torch.Tensor:
    """Eager at its best: the supervised rows are taken before the projection."""
    hidden = problem.hidden_ND[problem.supervised]
    loss = _eager(hidden, problem.weight_VD, problem.targets)
    loss.backward()
    return loss.detach()


def make_compiled() -> Arm:
    """torch.compile of the eager head over all rows."""
    if not torch.cuda.is_available() and not (shutil.which("g++") or shutil.which("clang++")):
        raise Skip("torch.compile needs a C++ compiler on a CPU, and there is none")
    head = torch.compile(_eager)

    def run(problem: Problem) -> torch.Tensor:
        loss = head(problem.hidden_ND, problem.weight_VD, problem.labels_N)
        loss.backward()
        return loss.detach()

    return run


def make_native(*, chunked: bool) -> Arm:
    """F.linear_cross_entropy (torch 2.13), as it is or with its chunked path asked for."""
    if not hasattr(functional, "linear_cross_entropy"):
        raise Skip(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def run(problem: Problem) -> torch.Tensor:
        loss = functional.linear_cross_entropy(
            problem.hidden_ND, problem.weight_VD, problem.labels_N, options=options
        )
        loss.backward()
        return loss.detach()

    return run


class _TrlModel(torch.nn.Module):
    """As much of a model as TRL's fused head asks for; its backbone returns the given hidden."""

    def __init__(self, weight_VD: torch.nn.Parameter) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        self.lm_head = torch.nn.Linear(1, 1, bias=False)
        self.lm_head.weight = weight_VD

    def base_model(self, hidden_1ND: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=hidden_1ND)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self) -> None:
        """Replaced by TRL."""


def make_trl(outputs: tuple[str, ...]) -> Arm:
    """TRL's fused head (trl.trainer.utils.add_fused_lm_head), which SFTTrainer always uses."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError as error:
        raise Skip(f"trl with a fused head is not installed ({error})") from None

    def run(problem: Problem) -> torch.Tensor:
        model = _TrlModel(problem.weight_VD)
        add_fused_lm_head(model, outputs=outputs)
        hidden_1ND, labels_1N = problem.hidden_ND[None], problem.labels_N[None]
        loss = model(hidden_1ND, shift_labels=labels_1N, fused_lm_head=True).loss
        loss.backward()
        return loss.detach()

    return run


def make_liger() -> Arm:
    """Liger's fused linear cross-entropy."""
    _need_gpu("Liger")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Skip(f"liger-kernel is not installed ({error})") from None
    head = LigerFusedLinearCrossEntropyLoss()

    def run(problem: Problem) -> torch.Tensor:
        loss = head(problem.weight_VD, problem.hidden_ND, problem.labels_N)
        loss.backward()
        return loss.detach()

    return run


def make_cce(implementation: str) -> Arm:
    """Apple's Cut Cross-Entropy."""
    _need_gpu("CCE")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Skip(f"cut-cross-entropy is not installed ({error})") from None

    def run(problem: Problem) -> torch.Tensor:
        loss = linear_cross_entropy(
            problem.hidden_ND, problem.weight_VD, problem.labels_N, impl=implementation
        )
        loss.backward()
        return loss.detach()

    return run


def _need_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        raise Skip(f"{name} runs its kernels on a GPU only")


def make_floor(problem: Problem) -> Callable[[], None]:
    """The matrix products alone, over the supervised rows: 3, or 2 with a frozen head."""
    used_ND = problem.hidden_ND.detach()[problem.supervised]
    weight_VD = problem.weight_VD.detach()
    logits_NV = used_ND @ weight_VD.T
    hidden_ND, grad_VD = torch.empty_like(used_ND), None
    if problem.weight_VD.requires_grad:
        grad_VD = torch.empty_like(weight_VD)

    def run() -> None:
        torch.mm(used_ND, weight_VD.T, out=logits_NV)
        torch.mm(logits_NV, weight_VD, out=hidden_ND)
        if grad_VD is not None:
            torch.mm(logits_NV.T, used_ND, out=grad_VD)

    return run


SFT_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer 1.16 asks its head for
ARMS: dict[str, Callable[[], Arm]] = {
    "ours": lambda: ours,
    "ours again": lambda: ours,  # A against A: what differs here is noise
    "ours, 8 channels": lambda: ours_8_channels,
    "eager": lambda: eager,
    "eager, gathered": lambda: eager_gathered,
    "torch.compile": make_compiled,
    "F.linear_cross_entropy": lambda: make_native(chunked=False),
    "F.linear_cross_entropy, chunked": lambda: make_native(chunked=True),
    "TRL": lambda: make_trl(SFT_OUTPUTS),
    "TRL, loss only": lambda: make_trl(("log_probs",)),
    "Liger": make_liger,
    "CCE": lambda: make_cce("cce"),
    "CCE exact": lambda: make_cce("cce_exact"),
}
