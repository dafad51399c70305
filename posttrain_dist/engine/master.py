"""AdamW in float32 for parameters of any dtype, the gradient norm known when backward ends.

backward        each gradient's norm is taken as it arrives, while it is still in cache
step            clipping is a factor inside the fused update, not a pass of its own;
                16-bit parameters: bucket by bucket gradient -> float32, update, parameter
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from posttrain_dist.engine import AdamW
from posttrain_dist.engine.optimizers import adamw, parameter_groups

# Elements of a bucket, whose gradients stand in float32 for the time of its update.
BUCKET_ELEMENTS = 1 << 26
PIECE_ELEMENTS = 1024


class MasterAdamW:
    """Updates `named` parameters; a float32 one is its own master, others have one beside them.

    Args:
        named: the parameters that are trained, by name.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: AdamW) -> None:
        self._limit = config.clip
        self._buckets = [_Bucket(part, config) for part in _parts(list(named))]
        self._norms: dict[nn.Parameter, torch.Tensor] = {}
        self._listening = False
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    def before_backward(self, *, last: bool) -> None:
        """Say that a backward begins; `last` of its step: its gradients are whole."""
        self._listening = last

    def step(self, lr: float) -> torch.Tensor:
        """Update, and drop the gradients.

        Returns:
            The global gradient norm before clipping, float32 on the device: nobody waited for it.
        """
        parameters = [p for bucket in self._buckets for p in bucket.parameters]
        norms = [
            self._norms[p] if p in self._norms else _norm(p.grad)  # not reached by the last one
            for p in parameters
            if p.grad is not None
        ]
        self._norms.clear()
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        too_large = None
        if self._limit:
            too_large = ((norm + 1e-6) / self._limit).clamp(min=1.0)
        for bucket in self._buckets:
            bucket.step(lr, too_large)
        return norm

    def state(self) -> list[dict[str, torch.Tensor]]:
        """Master and moments of each parameter, in their order, for `torch.save`."""
        return [
            {"master": master.detach(), **bucket.optimizer.state[master]}
            for bucket in self._buckets
            for master in bucket.masters
        ]

    def load_state(self, state: list[dict[str, torch.Tensor]]) -> None:
        """Take what `state` gave; 16-bit parameters themselves are not touched."""
        places = [(bucket, master) for bucket in self._buckets for master in bucket.masters]
        for (bucket, master), saved in zip(places, state, strict=True):
            moments = dict(saved)
            with torch.no_grad():
                master.copy_(moments.pop("master"))
            bucket.optimizer.state[master] = moments

    def _arrived(self, parameter: torch.Tensor) -> None:
        if self._listening and parameter.grad is not None:
            self._norms[parameter] = _norm(parameter.grad)  # type: ignore[index]


class _Bucket:
    """Parameters that are updated together."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], config: AdamW) -> None:
        self.parameters = [parameter for _, parameter in named]
        self.masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for p in self.parameters
        ]
        names = (name for name, _ in named)
        masters = zip(names, self.masters, strict=True)
        self.optimizer = adamw(parameter_groups(masters, config.weight_decay), config)

    def step(self, lr: float, too_large: torch.Tensor | None) -> None:
        pairs = list(zip(self.parameters, self.masters, strict=True))
        for parameter, master in pairs:
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The fused update divides each gradient by this as it reads it.
        self.optimizer.grad_scale = too_large  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for parameter, master in pairs:
                if master is not parameter:
                    parameter.copy_(master)


def _parts(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """One bucket where all are float32, which needs no room; else buckets of bounded size."""
    if all(parameter.dtype == torch.float32 for _, parameter in named):
        return [named] if named else []
    parts: list[list[tuple[str, nn.Parameter]]] = []
    size = BUCKET_ELEMENTS
    for name, parameter in named:
        if size + parameter.numel() > BUCKET_ELEMENTS:
            parts.append([])
            size = 0
        parts[-1].append((name, parameter))
        size += parameter.numel()
    return parts


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """Its 2-norm, float32. On a CPU torch adds up in float32 one after the other, which is off by
    1e-4 in millions of elements: there by pieces, and these in float64."""
    norm: torch.Tensor
    pieces = gradient.numel() // PIECE_ELEMENTS * PIECE_ELEMENTS
    if gradient.is_cuda or pieces == 0 or not gradient.is_contiguous():
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        return norm
    flat = gradient.view(-1)
    parts = torch.linalg.vector_norm(
        flat[:pieces].view(-1, PIECE_ELEMENTS), dim=1, dtype=torch.float32
    )
    rest = torch.linalg.vector_norm(flat[pieces:], dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.cat([parts, rest[None]]), dtype=torch.float64)
    return norm.float()
