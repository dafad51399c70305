"""IA3 (Liu et al., arXiv:2205.05638): vectors that scale keys, values and the MLP's inside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain_dist.errors import ModelError, Rule
from posttrain_dist.tuning.base import AdapterTuning, names_rule
from posttrain_dist.tuning.saved_adapter import SavedAdapter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from posttrain_dist.models.network.tensors import Linear

_log = logging.getLogger(__name__)


@contextmanager
def _as_plain_linears(model: Any) -> Iterator[None]:
    """Hide from `peft` that the base is in 4 bits.

    Its layer for that computes in float32 and hands float32 on, which a model in bfloat16 fails
    on; its plain one calls the quantised linear as it is.
    """
    quantised = getattr(model, "is_loaded_in_4bit", False)
    if not quantised:
        yield
        return
    model.is_loaded_in_4bit = False
    try:
        yield
    finally:
        model.is_loaded_in_4bit = True


@dataclass(kw_only=True, slots=True)
class Ia3(AdapterTuning):
    """One trained vector for each target, of ones at the start.

    It scales the output of a target, but the input of the second linear of an MLP.
    """

    # auto (keys, values and the second linear of the MLP), or a list of names.
    targets: Any = "auto"

    default_lr: ClassVar[float] = 3e-3
    marks: ClassVar[tuple[str, ...]] = ("ia3_l",)

    def rules(self) -> list[Rule]:
        """The targets are names."""
        return [names_rule("tuning.targets", self.targets)]

    def decays(self, name: str, shape: Sequence[int]) -> bool:
        """Never: decay pulls to zero, and a vector that does nothing is of ones."""
        return False

    def check_network(self, network: Mapping[str, Any]) -> None:
        """Find the targets in the modules of config.json, and refuse what `insert` would."""
        from posttrain_dist.tuning.injection.empty_model import empty_model, surely_fits

        if self.targets == "auto" and surely_fits(network):
            return
        model = empty_model(network)
        if model is not None:
            self._find_targets(model)

    def insert(self, model: nn.Module) -> None:
        """Put a vector beside each target.

        Raises:
            ConfigError: a target is not there, or is the head.
        """
        from posttrain_dist.tuning.injection.inject import inject, quiet_import

        quiet_import()
        import peft

        outputs, inputs = self._find_targets(model)
        config = peft.IA3Config(
            target_modules=[one.name for one in (*outputs, *inputs)],
            feedforward_modules=[one.name for one in inputs],
        )
        with _as_plain_linears(model):
            inject(config, model, self.marks)
        _log.info("IA3 on %d linear layers", len(outputs) + len(inputs))

    def off(self, model: nn.Module) -> AbstractContextManager[None]:
        """The layers give what their frozen linears give."""
        from posttrain_dist.tuning.injection.inject import switched_off

        return switched_off(model, "ia3_l")

    def _find_targets(self, model: nn.Module) -> tuple[list[Linear], list[Linear]]:
        from posttrain_dist.tuning.injection.targets import kinds_of, linears, refuse_head

        outputs, inputs = self.scaled(linears(model), kinds_of(model))
        refuse_head(model, [one.name for one in (*outputs, *inputs)])
        return outputs, inputs

    def scaled(
        self, every: list[Linear], what_it_is: Callable[[str], str] = lambda name: ""
    ) -> tuple[list[Linear], list[Linear]]:
        """Of the linear layers of a model those whose output is scaled, and whose input is.

        Args:
            what_it_is: see `targets.kinds_of`.

        Raises:
            ConfigError: a target is not there.
        """
        from posttrain_dist.tuning.injection.targets import (
            keys_values_and_mlp,
            matching,
            scales_input,
        )

        if self.targets == "auto":
            return keys_values_and_mlp(every)
        found = matching(every, self.targets, what_it_is)
        inputs = [one for one in found if scales_input(one)]
        return [one for one in found if one not in inputs], inputs

    def to_adapter(
        self, kept: Mapping[str, torch.Tensor], network: Mapping[str, Any]
    ) -> SavedAdapter:
        """The adapter that plain `peft` loads: vectors [out, 1], of MLP inputs [1, in]."""
        from posttrain_dist.tuning.injection.inject import file_name
        from posttrain_dist.tuning.injection.low_rank import TRANSPOSED_TYPES

        targets = {name.partition(".ia3_l.")[0]: tensor for name, tensor in kept.items()}
        config = {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": list(targets),
            "feedforward_modules": [n for n, vector in targets.items() if vector.shape[0] == 1],
            "modules_to_save": None,
            "init_ia3_weights": True,
            "fan_in_fan_out": network.get("model_type") in TRANSPOSED_TYPES,
        }
        return SavedAdapter(config, {file_name(n): t.detach() for n, t in kept.items()})

    def from_adapter(
        self, saved: SavedAdapter, network: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Tensors by their names in the attached model.

        Raises:
            ModelError: the adapter is of another method, or trains more.
        """
        from posttrain_dist.tuning.injection.inject import model_name

        method, more = saved.config.get("peft_type"), saved.config.get("modules_to_save")
        if method != "IA3" or more:
            what = f"is of the method {method}" if method != "IA3" else f"trains {more} in full"
            raise ModelError(
                f"the adapter {what}, this tuning is IA3 alone",
                where="tuning.init_from",
                fix="choose the tuning that it was trained with",
            )
        return {model_name(name): tensor for name, tensor in saved.tensors.items()}

    def merge(
        self,
        name: str,
        weight: torch.Tensor,
        kept: Mapping[str, torch.Tensor],
        network: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """The base tensor scaled: rows of the weight and the bias, or columns of the weight."""
        from posttrain_dist.tuning.injection.inject import ADAPTER, base_name
        from posttrain_dist.tuning.injection.low_rank import is_turned

        own = base_name(kept, name)
        module, _, leaf = own.rpartition(".")
        vector = kept.get(f"{module}.ia3_l.{ADAPTER}")
        if vector is None or leaf not in ("weight", "bias"):
            return weight
        vector = vector.to(weight.device).float()
        of_input = vector.shape[0] == 1
        if leaf == "bias":
            if of_input:  # it scales what the weight is multiplied by
                return weight
            factor = vector.flatten()
        else:
            sizes = (None, vector.numel()) if of_input else (vector.numel(), None)
            factor = vector.T if is_turned(weight, own, sizes, network) else vector
        return (weight.float() * factor).to(weight.dtype)
