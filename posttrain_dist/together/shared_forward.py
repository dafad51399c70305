"""One pass of the backbone for the rows of all runs; each run still sees an engine of its own.

The runs have the same data in the same order, so that micro-batch m of step s is the same for all.
The first that comes to it, the leader, computes the row of all of them; what the others get when
they come is ready, gradients too. A run that stands at another step goes alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from posttrain_dist.engine import AdamW
from posttrain_dist.engine.optimizers import ParameterRules
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.errors import TrainingError
from posttrain_dist.flow import Batch, Loss
from posttrain_dist.models.policy import Policy
from posttrain_dist.together.segments import Segments
from posttrain_dist.tuning.virtual import repeated


@dataclass(frozen=True, slots=True)
class _Ready:
    """What the leader has computed for another run."""

    loss: Loss
    sample_id_S: list[int]
    denominators: Any


@dataclass(slots=True)
class Group:
    """The runs that share passes.

    Attributes:
        shares: whether passes are shared now; not before every run has come to its first step.
    """

    shares: bool = False
    members: list[MemberEngine] = field(default_factory=list)
    segments: Segments = field(default_factory=Segments)

    def leave(self, engine: MemberEngine) -> None:
        """Take out a run that has ended."""
        if engine in self.members:
            self.members.remove(engine)
            self.segments.remove(engine.tree)

    def at(self, engine: MemberEngine) -> list[MemberEngine]:
        """The run of `engine` and those that stand where it stands, it first."""
        others = [each for each in self.members if each is not engine]
        return [engine, *(each for each in others if each.place == engine.place)]


class MemberEngine(SingleEngine):
    """The engine of one run of a group."""

    def __init__(
        self, optimizer: AdamW, device: torch.device, rules: ParameterRules, group: Group
    ) -> None:
        super().__init__(optimizer, device, rules)
        self._group = group
        self._micro = 0  # forwards of this step
        self._ready: list[_Ready] = []
        self._sharing: list[tuple[MemberEngine, torch.Tensor]] = []  # of the pass that it leads
        self._got = False  # whether the pass that comes back is another's

    @property
    def tree(self) -> nn.Module:
        """The modules of this run."""
        return self.policy

    @property
    def place(self) -> tuple[int, int]:
        """Updates so far, and micro-batches since."""
        return self._num_updates, self._micro + len(self._ready)

    def attach(self, policy: nn.Module) -> None:
        super().attach(policy)
        self._group.members.append(self)
        self._group.segments.add(policy, head=policy.head.module)  # type: ignore[arg-type,union-attr]

    def forward(self, batch: Batch, objective: Any, denominators: Any) -> Loss:
        if not (self._group.shares and torch.is_grad_enabled()):
            return super().forward(batch, objective, denominators)
        if self._ready:
            self._micro += 1
            self._got = True
            return _checked(self._ready.pop(0), batch, denominators)
        peers = self._group.at(self)
        self._micro += 1
        if len(peers) == 1:
            return super().forward(batch, objective, denominators)
        self._group.segments.begin([each.tree for each in peers])
        leader: Policy = self.policy  # type: ignore[assignment]
        hidden = leader.hidden(repeated(batch, len(peers)))
        own: list[Loss] = []
        for each, part in zip(peers, hidden.tensor_split(len(peers)), strict=True):
            head = each.policy.head
            own.append(objective.loss(part, head, batch, denominators))
        self._sharing = [(each, loss.total) for each, loss in zip(peers, own, strict=True)]
        for each, loss in zip(peers[1:], own[1:], strict=True):
            done = loss._replace(total=loss.total.detach())
            each._ready.append(_Ready(done, batch.sample_id_S, denominators))
        return own[0]

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if self._got:  # its gradients came with those of the leader
            self._got = False
            return
        if not self._sharing:
            super().backward(loss, last=last)
            return
        sharing, self._sharing = self._sharing, []
        for each, _ in sharing:
            each._optimizer.before_backward(last=last)
        try:
            torch.stack([total for _, total in sharing]).sum().backward()  # type: ignore[no-untyped-call]
        finally:
            self._group.segments.end()

    def step(self, lr: float) -> torch.Tensor:
        self._micro = 0
        return super().step(lr)


def _checked(ready: _Ready, batch: Batch, denominators: Any) -> Loss:
    """The loss, if it is that of this batch."""
    if ready.sample_id_S != batch.sample_id_S or ready.denominators != denominators:
        raise TrainingError(
            "runs that train together came to different samples in the same step",
            where=f"samples {batch.sample_id_S[:4]}",
            fix="train them one by one, and report this: their data are compared before they start",
        )
    return ready.loss
