"""Plain torch in one process: short, and the yardstick of the other engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain_dist.engine import AdamW
from posttrain_dist.engine.base import stored_tensors
from posttrain_dist.engine.optim import adamw, parameter_groups
from posttrain_dist.flow import Batch, Loss


class SingleEngine:
    """One process. Weights in bfloat16 have a float32 master that the optimizer updates."""

    world = 1

    def __init__(self, optimizer: AdamW, device: torch.device) -> None:
        self.device = device
        self._config = optimizer

    def materialise(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def attach(self, policy: nn.Module) -> None:
        self.policy = policy.to(self.device)
        trained = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in trained]
        # A float32 parameter is its own master.
        self._masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for p in self._parameters
        ]
        named = [(n, m) for (n, _), m in zip(trained, self._masters, strict=True)]
        self._optimizer = adamw(parameter_groups(named, self._config.weight_decay), self._config)

    def forward(self, batch: Batch, objective: Any, denominator: float) -> Loss:
        loss: Loss = self.policy(batch, objective, denominator)
        return loss

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> float:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        limit = self._config.clip or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self._masters, limit))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._copy_masters()
        return norm

    def train(self, mode: bool) -> None:
        self.policy.train(mode)

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in stored_tensors(self.policy):
            yield name, tensor.detach()

    def save_state(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "policy": self.policy.state_dict(),
            "masters": [m.detach() for m in self._masters],
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, folder / "single.pt")

    def load_state(self, folder: Path) -> None:
        state = torch.load(folder / "single.pt", map_location=self.device, weights_only=True)
        self.policy.load_state_dict(state["policy"])
        with torch.no_grad():
            for master, saved in zip(self._masters, state["masters"], strict=True):
                master.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])

    def _copy_masters(self) -> None:
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                if master is not parameter:
                    parameter.grad = None
                    parameter.copy_(master)


def read_full_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a saved state, without a model; tied names may appear twice."""
    state = torch.load(folder / "single.pt", map_location="cpu", weights_only=True, mmap=True)
    for name, tensor in state["policy"].items():
        yield name.removeprefix("causal_lm."), tensor
