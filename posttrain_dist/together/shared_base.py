"""Trees of modules over the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import nn


class SharedBase:
    """A model that is loaded once, and of which every run gets a tree of modules of its own.

    Args:
        load: the model before it is tuned.
    """

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._model: nn.Module | None = None

    def tree(self) -> nn.Module:
        """New modules with the parameters and buffers of the one model."""
        if self._model is None:
            self._model = self._load().requires_grad_(False)
        tensors = chain(self._model.parameters(), self._model.buffers())
        memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
        return copy.deepcopy(self._model, memo)
