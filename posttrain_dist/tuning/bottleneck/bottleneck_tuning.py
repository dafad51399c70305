"""The tuning `bottleneck`: where the adapters stand, and what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain_dist.errors import ConfigError, Rule, at_least
from posttrain_dist.tuning.base import AdapterTuning, SavedAdapter, above_zero
from posttrain_dist.tuning.bottleneck import adapters_format

if TYPE_CHECKING:
    import torch
    from torch import nn


class Placement(Enum):
    """Where the adapters stand: always before the residual is added, and before a norm there."""

    houlsby = "houlsby"  # after the attention and after the MLP
    pfeiffer = "pfeiffer"  # after the MLP (Pfeiffer et al., arXiv:2005.00247)
    parallel = "parallel"  # beside the MLP (He et al., arXiv:2110.04366)


class Nonlinearity(Enum):
    """Between the two matrices."""

    relu = "relu"
    silu = "silu"
    gelu = "gelu"


@dataclass(kw_only=True, slots=True)
class Bottleneck(AdapterTuning):
    """y + scale · up(f(down(y))) of a sublayer's output y, with `up` zero at the start.

    Beside the MLP it is MLP(x) + scale · up(f(down(x))).
    """

    placement: Placement = Placement.pfeiffer
    reduction: int = 16  # hidden size over the width of the bottleneck
    nonlinearity: Nonlinearity = Nonlinearity.relu
    scale: float = 1.0

    default_lr: ClassVar[float] = 1e-3
    marks: ClassVar[tuple[str, ...]] = ("bottleneck",)

    def rules(self) -> list[Rule]:
        """Ranges; the sizes of the model are compared when it is there."""
        return [
            at_least("tuning.reduction", self.reduction, 1, 10**6),
            above_zero("tuning.scale", self.scale, 10**6),
        ]

    @property
    def unmergeable(self) -> str:
        """Always, by the function between the matrices."""
        return (
            f"a bottleneck adapter has a {self.nonlinearity.name} between its matrices, which no "
            "weight of the model can take in"
        )

    def check_network(self, network: Mapping[str, Any]) -> None:
        """Refuse a model that is too narrow, or has no MLP to stand beside.

        Raises:
            ConfigError: why not.
        """
        from posttrain_dist.models.shape import ModelShape

        self._width(ModelShape.of(network).hidden_size)
        model_type = str(network.get("model_type"))
        _, mlp = adapters_format.sublayers(model_type)
        # Two linears without a module around them, which would have the input of both.
        if self.placement is Placement.parallel and mlp != "mlp":
            raise self._no_module(model_type, "mlp", f"{mlp} and others")

    def insert(self, model: nn.Module) -> None:
        """Give every decoder layer its adapters.

        Raises:
            ConfigError: the layers have no such sublayer, or are too narrow.
        """
        from posttrain_dist.models.layers import decoder_layers
        from posttrain_dist.models.shape import ModelShape
        from posttrain_dist.tuning.bottleneck.bottleneck_layer import (
            BottleneckLayer,
            add_bottleneck,
        )

        config: Any = model.config
        self.check_network(config.to_dict())
        hidden_size = ModelShape.of(config.to_dict()).hidden_size
        width = self._width(hidden_size)
        # Of the embeddings, which stay as they are in a quantised model.
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        options = {"dtype": embeddings.weight.dtype, "device": embeddings.weight.device}
        for layer in decoder_layers(model):
            for name in self._sublayers(config.model_type, layer):
                adapter = BottleneckLayer(
                    hidden_size, width, self.nonlinearity.name, self.scale, **options
                )
                parallel = self.placement is Placement.parallel
                add_bottleneck(getattr(layer, name), adapter, parallel=parallel)

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        """The sublayers leave their adapters out."""
        from posttrain_dist.tuning.bottleneck.bottleneck_layer import BottleneckLayer

        adapters = [each for each in model.modules() if isinstance(each, BottleneckLayer)]
        for adapter in adapters:
            adapter.off = True
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.off = False

    def to_adapter(
        self, kept: Mapping[str, torch.Tensor], network: Mapping[str, Any]
    ) -> SavedAdapter:
        """Config and tensors as the `adapters` library has them in its folders."""
        tensors = adapters_format.to_files(kept, str(network.get("model_type")))
        return SavedAdapter(self._config(network), tensors)

    def from_adapter(
        self, saved: SavedAdapter, network: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The inverse of `to_adapter`; the name of the adapter in the files may be another.

        Raises:
            ModelError: the adapter is of another method, or of other sizes.
        """
        adapters_format.check_config(saved.config, self._config(network))
        attention = self.placement is Placement.houlsby
        return adapters_format.from_files(saved.tensors, network, attention=attention)

    def _config(self, network: Mapping[str, Any]) -> dict[str, Any]:
        return adapters_format.config_of(
            network,
            attention=self.placement is Placement.houlsby,
            parallel=self.placement is Placement.parallel,
            reduction=self.reduction,
            nonlinearity=self.nonlinearity.name,
            scale=self.scale,
        )

    def _width(self, hidden_size: int) -> int:
        width = hidden_size // self.reduction
        if width == 0:
            raise ConfigError(
                f"is {self.reduction}, and the model's hidden size is {hidden_size}: nothing of it "
                "is left",
                where="tuning.reduction",
                fix="set 16, or another number below the hidden size",
            )
        return width

    def _sublayers(self, model_type: str, layer: nn.Module) -> list[str]:
        """Names in `layer` of what gets an adapter."""
        attention, mlp = adapters_format.sublayers(model_type)
        wanted = [attention, mlp] if self.placement is Placement.houlsby else [mlp]
        there = [name for name, _ in layer.named_children()]
        missing = [name for name in wanted if name not in there]
        if missing:
            raise self._no_module(model_type, missing[0], ", ".join(there))
        return wanted

    def _no_module(self, model_type: str, name: str, there: str) -> ConfigError:
        return ConfigError(
            f"is {self.placement.name}, and the layers of a {model_type} have no module {name!r}: "
            f"they have {there}",
            where="tuning.placement",
            fix="use tuning.placement=pfeiffer, or tuning=lora",
        )
