"""What every engine does; `single.py` and `deepspeed.py` are the two that do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from posttrain_dist.files import FileDigest
    from posttrain_dist.flow import Batch, Loss


class TrainEngine(Protocol):
    """Runs a Policy and holds its optimizer state. All calls are collective over the ranks."""

    device: torch.device
    world: int

    def materialise(self) -> AbstractContextManager[Any]:
        """The context in which a model is built, so that no rank holds more than its share."""

    def attach(self, policy: nn.Module) -> None:
        """Take the loaded policy: place it, make the optimizer."""

    def attach_frozen(self, policy: nn.Module) -> None:
        """Take a loaded policy in the place of `attach` that is only run forward."""

    def forward(self, batch: Batch, objective: Any, denominators: Any) -> Loss:
        """The loss of one micro-batch; with gradients unless under `torch.no_grad`.

        Args:
            denominators: the sums of `objective.count` over all micro-batches and ranks.
        """

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` marks the step's last one."""

    def step(self, lr: float) -> torch.Tensor | float:
        """Update the parameters; returns the global gradient norm before clipping.

        A tensor may still be under way on the device: reading it waits.
        """

    def forget_updates(self) -> None:
        """Be again before the first update, after updates by gradients of zero at rate zero.

        Those leave every weight as it was; what they left else is undone in place: moments are
        zero, and no update was counted.
        """

    def train(self, mode: bool) -> None:
        """Switch between training (dropout) and evaluation."""

    def full_tensors(
        self, wanted: Callable[[str], bool] = lambda name: True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The wanted parameters whole, one after the other; each valid until the next is asked for.

        Args:
            wanted: by its name in the causal LM.
        """

    def save_state(self, folder: Path) -> Mapping[str, FileDigest]:
        """Write this rank's share of parameters and optimizer state.

        Returns:
            Digests made while writing, by path below `folder`; other files are read back for it.
        """

    def load_state(self, folder: Path) -> None:
        """Read what `save_state` wrote in the same layout."""

    def local_state(
        self, wanted: Callable[[str], bool], *, moments: bool = True
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """For each wanted trained parameter, what of its state lies on this rank; not collective.

        Args:
            wanted: by its name in the causal LM.
            moments: with those, not the master alone.

        Returns:
            Name in the causal LM -> flat float32 `master` and, once there was an update, `exp_avg`
            and `exp_avg_sq`; the same part of each. Empty where nothing of it lies here.
        """

    def named_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """The optimizer state of each trained parameter, whole and exact; valid until the next.

        Returns:
            Name in the causal LM -> `master` (float32), and once there was an update `step` and
            `exp_avg`, `exp_avg_sq`; in their place the blocks of an 8-bit optimizer.
        """

    def load_named_state(self, get: Callable[[str], dict[str, torch.Tensor]], step: int) -> None:
        """Take what `named_state` of any engine gave; parameters become their masters, rounded.

        Args:
            get: name in the causal LM -> the tensors, on the CPU.
            step: updates that the state has had.
        """

    def load_full_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set frozen parameters and buffers; `tensors` by name, the same on all ranks."""


def stored_tensors(policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters (tied ones once) and persistent buffers under the names of the causal LM."""
    named: dict[str, torch.Tensor] = dict(policy.named_parameters())
    for module_name, module in policy.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                named[f"{module_name}.{name}"] = buffer
    for name, tensor in named.items():
        yield name.removeprefix("causal_lm."), tensor
