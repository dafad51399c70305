"""Whether training moves what it should: every trained tensor, and no frozen one.

A tensor that is not connected to the loss, or that the optimizer does not hold, stays as it is and
nothing else fails. So the optimizer's own state is asked, once: moments that are zero say that no
gradient came, and a master that moved by no more than weight decay says that no update came.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from posttrain_dist import dist
from posttrain_dist.engine import AdamW
from posttrain_dist.engine.base import TrainEngine
from posttrain_dist.engine.optimizers import (
    ParameterRules,
    causal_lm_name,
    trained_parameters,
    whole_shape,
)
from posttrain_dist.errors import TrainingError
from posttrain_dist.flow import StepInfo

_log = logging.getLogger(__name__)

FIRST = 2  # updates before the check: with B = 0 the first gradient of LoRA's A is 0
SAMPLES = 4096  # elements of each master that are looked at
FROZEN_SAMPLES = 4  # frozen tensors that each logged step looks at
_ULP = 2.0**-23  # relative spacing of float32
_CHUNK = 1 << 24  # elements that are summed at once: a CPU converts them to int64 first
_ROW = 1024


@dataclass(slots=True)
class _Trained:
    """A trained tensor that is still to be checked, on this rank."""

    before: torch.Tensor  # sampled elements of the master; none where nothing lies here
    decay: float  # rate of weight decay over the learning rate
    lr_ratio: float
    sparse: bool


@dataclass(frozen=True, slots=True)
class _Found:
    """What the check of one trained tensor saw, on all ranks."""

    gradient: bool  # a moment is not zero
    nonfinite: bool
    visible: bool  # an update is large enough to show in float32
    moved: bool  # by more than weight decay


class UpdateCheck:
    """A hook that ends a run in which a trained tensor stays, or a frozen one moves.

    Trained tensors are checked after two updates. One whose updates are too small to show in
    float32 yet (early in a long warm-up) is checked again after 4, 8, 16 ... updates, and at the
    end. Frozen ones are compared by a digest, a few at each logged step, all at the end.

    Args:
        learning_rate: update -> its rate.
        start: updates before this start; the state of its checkpoint is loaded.
    """

    def __init__(
        self,
        engine: TrainEngine,
        policy: nn.Module,
        optimizer: AdamW,
        rules: ParameterRules,
        learning_rate: Callable[[int], float],
        start: int,
    ) -> None:
        self._engine, self._optimizer, self._rates = engine, optimizer, learning_rate
        self._start, self._silent = start, False
        trained = trained_parameters(policy)
        self._count = len(trained)
        self._pending: dict[str, _Trained] = {}
        for name, state in engine.local_state(lambda name: True, moments=False):
            decays = rules.decays(name, whole_shape(trained[name]))
            self._pending[name] = _Trained(
                _sampled(state.get("master")).clone(),
                optimizer.weight_decay if decays else 0.0,
                rules.lr_ratio(name),
                rules.sparse(name),
            )
        self._frozen = {
            causal_lm_name(n): p for n, p in policy.named_parameters() if not p.requires_grad
        }
        self._digests = {name: _digest(p) for name, p in self._frozen.items()}

    def __call__(self, info: StepInfo) -> None:
        """Look at one step; collective.

        Raises:
            TrainingError: a trained tensor had no gradient, one that is not finite, or did not
                move; or a frozen one moved.
        """
        updates = info.step - self._start
        if updates <= 0 or info.nonfinite_step:
            return
        due = updates >= FIRST and updates & (updates - 1) == 0
        if self._pending and (due or info.last):
            self._check_trained(info, updates)
        if info.last or info.metrics:
            names = list(self._frozen)
            if not info.last:
                first = info.step * FROZEN_SAMPLES
                names = [names[(first + i) % len(names)] for i in range(FROZEN_SAMPLES) if names]
            self._check_frozen(dict.fromkeys(names), info.step)

    def _check_trained(self, info: StepInfo, updates: int) -> None:
        found = self._look(info.step, updates)
        nonfinite = [name for name, each in found.items() if each.nonfinite]
        _refuse(
            nonfinite,
            self._count,
            "had a gradient that is not finite",
            info.step,
            "give it optimizer.lr=<half of it>, keep optimizer.clip above 0, or try "
            "train.dtype=float32",
        )
        none = [name for name, each in found.items() if not each.gradient]
        # A loss that is still 0 everywhere says nothing about a single tensor; after that the first
        # gradient of LoRA's A is 0 again.
        silent = len(none) == self._count
        if updates >= FIRST and (info.last if silent else not self._silent):
            _refuse(
                [name for name in none if not self._pending[name].sparse],
                self._count,
                f"had no gradient in {updates} updates",
                info.step,
                "the loss does not depend on them: train others (tuning.train, tuning.targets), "
                "or give rows and weights that reach them",
            )
        self._silent = silent
        stayed = [n for n, e in found.items() if e.gradient and e.visible and not e.moved]
        _refuse(
            stayed,
            self._count,
            f"did not move in {updates} updates, but for weight decay,",
            info.step,
            "the optimizer does not update them: this is a fault of the engine or of the tuning; "
            "report it with config.yaml",
        )
        done = [name for name, each in found.items() if each.gradient and each.visible]
        for name in done:
            del self._pending[name]
        if info.last and self._pending:
            few = ", ".join(list(self._pending)[:3])
            _log.warning("no update of %s was seen: too small, or no row reached it", few)

    def _look(self, step: int, updates: int) -> dict[str, _Found]:
        rows, names = [], []
        for name, state in self._engine.local_state(self._pending.__contains__):
            names.append(name)
            rows.append(self._look_at(self._pending[name], state, step, updates))
        # Under CPU offload some of it is there, and what lies on no rank here is nowhere.
        table = dist.all_max(torch.stack([row.cpu() for row in rows])).bool().tolist()
        return {name: _Found(*row) for name, row in zip(names, table, strict=True)}

    def _look_at(
        self, trained: _Trained, state: dict[str, torch.Tensor], step: int, updates: int
    ) -> torch.Tensor:
        """The fields of `_Found` on this rank, as numbers."""
        before = trained.before
        if "exp_avg" not in state or not len(before):
            return torch.zeros(4)
        config = self._optimizer
        largest = torch.linalg.vector_norm(state["exp_avg"], float("inf"))
        rates = [trained.lr_ratio * self._rates(step - i) for i in range(updates)]
        kept = 1.0
        for rate in rates:
            kept *= 1.0 - rate * trained.decay
        # What the last update was, by the formula of Adam.
        mean = _sampled(state["exp_avg"]) / (1 - config.beta1**step)
        square = _sampled(state["exp_avg_sq"]) / (1 - config.beta2**step)
        update = rates[0] * mean / (square.sqrt() + config.eps)
        rounding = before.abs() * _ULP * (updates + 2)
        moved = (_sampled(state["master"]) - before * kept).abs() > rounding
        visible = update.abs() > 4 * rounding
        return torch.stack([largest != 0, ~largest.isfinite(), visible.any(), moved.any()]).float()

    def _check_frozen(self, names: Iterable[str], step: int) -> None:
        names = list(names)
        changed = [float(_digest(self._frozen[n]) != self._digests[n]) for n in names]
        if not names:
            return
        anywhere = dist.all_max(torch.tensor(changed)).tolist()
        _refuse(
            [name for name, is_changed in zip(names, anywhere, strict=True) if is_changed],
            len(self._frozen),
            "changed",
            step,
            "something writes to the weights of the base model, which no save of this run holds: "
            "go on from an older checkpoint, and report it with config.yaml",
            kind="frozen",
        )


def _refuse(
    names: list[str], count: int, what: str, step: int, fix: str, kind: str = "trained"
) -> None:
    """End the run if there are any names."""
    if not names:
        return
    few = ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
    raise TrainingError(
        f"{len(names)} of {count} {kind} parameters {what}: {few}", where=f"step {step}", fix=fix
    )


def _sampled(flat: torch.Tensor | None) -> torch.Tensor:
    """At most SAMPLES elements, evenly spread."""
    if flat is None:
        return torch.zeros(0)
    return flat.detach()[:: -(-len(flat) // SAMPLES) or 1]


def _digest(parameter: Any) -> int:
    """A number that changes with the bits of a parameter, under ZeRO-3 of this rank's shard.

    Sums of integers by column, weighted by column, on its device: bits that change, and elements
    that change places, show.
    """
    tensor: torch.Tensor = getattr(parameter, "ds_tensor", parameter).detach().reshape(-1)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.view(kind)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    weights = torch.arange(1, _ROW + 1, device=bits.device)
    for i, piece in enumerate(torch.split(bits, _CHUNK)):
        rows = len(piece) // _ROW * _ROW
        columns = piece[:rows].view(-1, _ROW).sum(0, dtype=torch.int64)
        columns[: len(piece) - rows] += piece[rows:]
        total += (columns * weights).sum() * (2 * i + 1)
    return int(total)
