"""Full fine-tuning, of every parameter or of those that a pattern names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain_dist.errors import ConfigError, Rule
from posttrain_dist.tuning.base import Tuning

if TYPE_CHECKING:
    from torch import nn


@dataclass(kw_only=True, slots=True)
class Full(Tuning):
    """Every parameter is trained, or those whose whole name matches `train`."""

    # A regular expression of parameter names: "model.layers.3[01][.].*"; null: all.
    train: str | None = None

    def rules(self) -> list[Rule]:
        """The pattern compiles."""
        try:
            re.compile(self.train or "")
        except re.error as error:
            what = f"is {self.train!r}, no regular expression: {error}"
            return [Rule(False, "tuning.train", what, "correct the pattern, or set it to null")]
        return []

    def trained(self, name: str) -> bool:
        """Whether the pattern matches the whole name."""
        return self.train is None or re.fullmatch(self.train, name) is not None

    def attach(self, model: nn.Module) -> None:
        """Freeze the others.

        Raises:
            ConfigError: the pattern matches no parameter.
        """
        Tuning.attach(self, model)
        names = [name for name, _ in model.named_parameters()]
        if not any(map(self.trained, names)):
            raise ConfigError(
                f"{self.train!r} matches none of the {len(names)} parameters, such as "
                + ", ".join(names[:: max(1, len(names) // 6)][:6]),
                where="tuning.train",
                fix="write a regular expression of whole names, in quotes for Hydra and the shell: "
                "'tuning.train=\"model.layers.0[.].*\"'",
            )
