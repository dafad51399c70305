"""What an adapter folder holds, as a value: between the tunings and `tuning/adapters/`.

A file of its own, for a tuning reads the folder that it continues, and the reader of folders makes
this: it imports this file and not `tuning/base.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


ENSEMBLE = "posttrain_ensemble"  # key of a config: how many prompts stand in the tensors


class SavedAdapter(NamedTuple):
    """An adapter as its folder holds it."""

    config: dict[str, Any]  # adapter_config.json, but for the name of the base model
    tensors: dict[str, torch.Tensor]  # by the names of the file
