"""The last decoder layer: its MLP computes the supervised rows only, and only they leave it.

Behind it stand the final norm and the head, which then meet N rows instead of T. An MLP works row
by row, so this is exact, gradients too, in every architecture whose layer calls its MLP `mlp`.
Attention stays as the architecture has it: leaving out queries and output projection as well would
gain less than 0.5 % of a step of 32 layers (docs/performance.md).

The rows travel as the keyword `supervised_N` through the backbone; without it a model is as it was.
A backbone that gives its output the shape of its input (GPT-2) gets all rows, and its last ones are
selected behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from posttrain_dist.models.layers import decoder_layers

_log = logging.getLogger(__name__)


def select_supervised_rows(backbone: nn.Module, keep_rows: bool = False) -> None:
    """Make `backbone(..., supervised_N=rows)` return the last hidden states of these rows only.

    A layer without `mlp` runs on all rows, and the log says so.

    Args:
        keep_rows: only the MLP leaves the other rows out; what it returns has them all, and
            those that are not supervised hold nothing that is of use.

    Raises:
        ModelError: the backbone has no decoder layer.
    """
    last = decoder_layers(backbone)[-1]
    base = type(last)
    if not hasattr(last, "mlp"):
        _log.warning("the last layer runs on all rows: a %s has no `mlp`", base.__name__)
    # A subclass, not a function put on the object: activation checkpointing wraps the forward of
    # the class (transformers 5.23) or its call (5.17), and either way this forward runs again.
    last.__class__ = type(
        f"RowSelecting{base.__name__}", (base,), {"forward": _forward(base, keep_rows)}
    )


def _forward(base: Any, keep_rows: bool) -> Callable[..., Any]:
    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        *args: Any,
        supervised_N: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        if supervised_N is None:
            return base.forward(self, hidden_states, *args, **options)
        place_T = _places(supervised_N, hidden_states.shape[1])
        with _rows_of(getattr(self, "mlp", None), supervised_N, place_T):
            output = base.forward(self, hidden_states, *args, **options)
        return output if keep_rows else _index_rows(output, supervised_N)

    return forward


@contextmanager
def _rows_of(mlp: nn.Module | None, rows_N: torch.Tensor, place_T: torch.Tensor) -> Iterator[None]:
    """Let `mlp` compute these rows of its input [1, T, D] only; its output has T rows all the same.

    A row that is not computed gets another's output, which the selection behind the layer drops,
    so that its gradient is zero. Each of the N is used once, also where padding repeats a row.
    """
    if mlp is None:
        yield
        return
    with (
        mlp.register_forward_pre_hook(lambda _, args: _index_rows(args, rows_N)),
        mlp.register_forward_hook(lambda _, args, output: _index_rows(output, place_T)),
    ):
        yield


def _index_rows(values: Any, rows: torch.Tensor) -> Any:
    """Some rows of hidden states [1, T, D], which stand alone or first in a tuple."""
    if isinstance(values, tuple):
        return (values[0].index_select(1, rows), *values[1:])
    return values.index_select(1, rows)


def _places(rows_N: torch.Tensor, num_rows: int) -> torch.Tensor:
    """place_T: where row t first stands in `rows_N`; the last place where it does not stand."""
    places_N = torch.arange(len(rows_N), device=rows_N.device)
    place_T = places_N[-1].expand(num_rows).clone()
    return place_T.scatter_reduce_(0, rows_N, places_N, "amin")
