"""Who answers in a chat: a model, or several adapters on one, also those that `peft` knows not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import ModelError
from posttrain_dist.generation.adapter_places import (
    base_of,
    find_named,
    nf4_notice,
    own_adapters,
    stood_on_nf4,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from posttrain_dist.generation.local import LocalGenerator

_log = logging.getLogger(__name__)


def load_generator(
    folder: Path,
    adapters: Mapping[str, Path] | None = None,
    notice: Callable[[str], None] = _log.info,
) -> LocalGenerator:
    """The generator of a model or adapter folder, with more adapters on the same base.

    The first of `adapters` answers, if there is one; see `LocalGenerator.load`.

    Args:
        notice: called with what the user should know of the adapters.

    Raises:
        ModelError: a folder cannot be loaded, or an adapter is for another base model.
        ConfigError: two adapters have one name.
    """
    from posttrain_dist.generation.local import LocalGenerator
    from posttrain_dist.tuning.adapters.base_check import check_base

    given = adapters or {}
    found = find_named(given)
    own = {} if (folder / "config.json").is_file() else own_adapters(folder)
    base = base_of(next(iter(own.values()))) if own else folder
    for place in (*own.values(), *given.values()):
        if said := check_base(place, base):
            notice(said)
    every = {**own, **{name: place for each in found.values() for name, place in each.items()}}
    if said := nf4_notice(every, base, all(map(stood_on_nf4, every.values()))):
        notice(said)
    generator = LocalGenerator.load(folder, adapters=given, attach=_OwnMethods())
    for first in list(found.values())[:1]:
        generator.choose(next(iter(first)))
    return generator


class _OwnMethods:
    """Loads adapters of methods that `peft` does not know; see `generation.adapters.Attach`."""

    def __init__(self) -> None:
        self._first: Any = None  # tuning of the modules that are in the model

    def __call__(self, model: nn.Module, folder: Path) -> Mapping[str, torch.Tensor]:
        from posttrain_dist.tuning.adapters.adapter_folder import read_adapter
        from posttrain_dist.tuning.adapters.adapter_tuning import tuning_from_adapter

        tuning: Any = replace(tuning_from_adapter(folder), init_from=None)
        if self._first is None:
            tuning.attach(model)
            self._first = tuning
        if tuning != self._first:
            raise ModelError(
                "computes something else than the adapters before",
                where=str(folder),
                fix="load adapters of one method and of equal settings together",
            )
        config: Any = model.config
        found: dict[str, torch.Tensor] = tuning.from_adapter(read_adapter(folder), config.to_dict())
        return found
