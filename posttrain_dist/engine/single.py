"""Plain torch in one process: short, and the yardstick of the other engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain_dist.engine import AdamW
from posttrain_dist.engine.base import stored_tensors
from posttrain_dist.engine.blockwise import to_float
from posttrain_dist.engine.master import MasterAdamW
from posttrain_dist.engine.memory import keep_freed_memory
from posttrain_dist.engine.optimizers import ParameterRules, trained_parameters
from posttrain_dist.engine.state_files import STEP, fitting, read_state
from posttrain_dist.files import DigestWriter, FileDigest
from posttrain_dist.flow import Batch, Loss


class SingleEngine:
    """One process. Weights in bfloat16 have a float32 master that the optimizer updates."""

    world = 1

    def __init__(
        self, optimizer: AdamW, device: torch.device, rules: ParameterRules | None = None
    ) -> None:
        self.device = device
        self._config, self._rules = optimizer, rules
        self._num_updates = 0

    def materialise(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def attach(self, policy: nn.Module) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        self.policy = policy.to(self.device)
        trained = trained_parameters(policy).items()
        self._optimizer = MasterAdamW(trained, self._config, self._rules)

    def attach_frozen(self, policy: nn.Module) -> None:
        self.policy = policy.requires_grad_(False).to(self.device)

    def forward(self, batch: Batch, objective: Any, denominators: Any) -> Loss:
        loss: Loss = self.policy(batch, objective, denominators)
        return loss

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._optimizer.before_backward(last=last)
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> torch.Tensor:
        self._num_updates += 1
        return self._optimizer.step(lr)

    def forget_updates(self) -> None:
        self._num_updates = 0
        self._optimizer.forget_updates()

    def train(self, mode: bool) -> None:
        self.policy.train(mode)

    def full_tensors(
        self, wanted: Callable[[str], bool] = lambda name: True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in stored_tensors(self.policy):
            if wanted(name):
                yield name, tensor.detach()

    def save_state(self, folder: Path) -> dict[str, FileDigest]:
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "policy": self.policy.state_dict(),
            "optimizer": self._optimizer.state(),
            STEP: self._num_updates,
        }
        with DigestWriter(folder / "single.pt") as file:
            torch.save(state, file)
        return {"single.pt": file.digest}

    def load_state(self, folder: Path) -> None:
        # From the file, one tensor after the other: beside the run there is no room for all of it.
        state = read_state(folder / "single.pt", mmap=True)
        with fitting(folder):
            self.policy.load_state_dict(state["policy"])
            self._optimizer.load_state(state["optimizer"])
            self._num_updates = int(state[STEP])

    def local_state(
        self, wanted: Callable[[str], bool], *, moments: bool = True
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name, state in self._optimizer.named_state():
            if wanted(name):
                master = state["master"]
                found = to_float(state) if moments else {"master": master}
                found.pop("step", None)
                # Paged moments are memory of the host for torch.
                yield name, {key: v.to(master.device).reshape(-1) for key, v in found.items()}

    def named_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        return self._optimizer.named_state()

    def load_named_state(self, get: Callable[[str], dict[str, torch.Tensor]], step: int) -> None:
        self._optimizer.load_named_state(get)
        self._num_updates = step

    @torch.no_grad()
    def load_full_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in stored_tensors(self.policy):
            if name in tensors:
                tensor.copy_(tensors[name])


def read_full_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a saved state, without a model; tied names may appear twice."""
    with fitting(folder):
        tensors = read_state(folder / "single.pt", mmap=True)["policy"].items()
    for name, tensor in tensors:
        yield name.removeprefix("causal_lm."), tensor
