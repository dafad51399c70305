"""Which parameters are trained, and what is inserted for it: the slot, and what Policy asks.

    off         the base model again, while a context lasts
    attach      insert, freeze, continue an adapter; once, while the engine materialises the model
    extend, embed, row_keywords, copies     what a packed row becomes in every forward
    trained, kept, decays, lr_ratio         what the engine and the checkpoints ask, by name
    to_adapter, from_adapter, merge         what is saved, and how it goes back

Parameters are named as in the causal LM after `attach`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain_dist.errors import ModelError, Rule, at_least
from posttrain_dist.models.classifier import SCORE
from posttrain_dist.tuning.saved_adapter import SavedAdapter as SavedAdapter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from posttrain_dist.flow import Batch


class Quantize(Enum):
    """Storage of the frozen base weights."""

    none = "none"
    # 4-bit NormalFloat with double quantisation (Dettmers et al., arXiv:2305.14314).
    nf4 = "nf4"


@dataclass(kw_only=True, slots=True)
class Tuning:
    """The slot `tuning`: a dataclass whose fields are its knobs. Here every parameter is trained.

    Attributes:
        default_lr: peak learning rate where `optimizer.lr` is null.
        whole_model: whether checkpoints and exports hold the whole model; else only what is kept.
    """

    default_lr: ClassVar[float] = 1e-5
    whole_model: ClassVar[bool] = True

    @property
    def unmergeable(self) -> str:
        """Why what is trained cannot become part of the model's own weights; empty if it can."""
        return ""

    @property
    def mergeable(self) -> bool:
        """Whether what is trained can become part of the model's own weights."""
        return not self.unmergeable

    @property
    def unrestorable(self) -> str:
        """Why `off` does not give the base model back; empty if it does."""
        return "trains the model itself"

    @property
    def begins_as_base(self) -> bool:
        """Whether the model that training starts with is the base model."""
        return True

    @property
    def effect(self) -> str:
        """What of the values nobody reads off the config, for the first lines of a run; or ""."""
        return ""

    def rules(self) -> list[Rule]:
        """What must hold among the values of the group."""
        return []

    def check_network(self, network: Mapping[str, Any]) -> None:
        """Refuse a model that this cannot be done to, by what its config.json says; nothing else.

        Raises:
            PosttrainError: why not.
        """

    # -------------------------------------------------------------------- parameters, by name

    def trained(self, name: str) -> bool:
        """Whether the parameter `name` is trained."""
        return True

    def kept(self, name: str) -> bool:
        """Whether the tensor `name` belongs to the checkpoints of a tuning without whole model."""
        return self.trained(name)

    def decays(self, name: str, shape: Sequence[int]) -> bool:
        """Whether weight decay applies: to matrices, not to norms, biases and other vectors."""
        return len(shape) >= 2

    def lr_ratio(self, name: str) -> float:
        """What the learning rate is multiplied by for the parameter `name`."""
        return 1.0

    def sparse(self, name: str) -> bool:
        """Whether steps without any gradient are normal for `name`: embeddings of rare tokens."""
        return "trainable_tokens_delta" in name

    # ------------------------------------------------------------------------------ the model

    def attach(self, model: nn.Module) -> None:
        """Insert modules, if any, and freeze what is not trained.

        Called once, inside the engine's `materialise()`, with torch's seed set. What is inserted
        must be a module that is called, so that its hooks fire under ZeRO-3.
        """
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trained(name))

    def off(self, model: nn.Module) -> AbstractContextManager[None]:
        """While the context lasts, what was inserted does nothing; no parameter is touched.

        That of virtual tokens, which stand in the row and not in the model, the policy leaves out.
        """
        return nullcontext()

    @property
    def copies(self) -> int:
        """How often each row is trained on at once, each time by other parameters (ensembles)."""
        return 1

    @property
    def virtual_tokens(self) -> int:
        """How many positions come before those of a sample."""
        return 0

    @property
    def inserted_tokens(self) -> int:
        """How many of these are tokens of the row; the others are keys and values alone."""
        return self.virtual_tokens

    def extend(self, batch: Batch) -> Batch:
        """The row that the model runs on: with virtual tokens, if there are any.

        `supervised_N` still names the rows that predict `labels_N`; with `copies`, those of each
        copy in turn. See `tuning/virtual.py`.
        """
        return batch

    def embed(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """Embeddings [T, D] of an extended row; None: the model's own, of `input_ids_T`."""
        return None

    def row_keywords(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """More keywords that travel through the backbone to every attention."""
        return {}

    # ------------------------------------------------------------------------------ the files

    def to_adapter(
        self, kept: Mapping[str, torch.Tensor], network: Mapping[str, Any]
    ) -> SavedAdapter:
        """What is kept, as an adapter that `peft` loads.

        Args:
            kept: every tensor that `kept` names, whole.
            network: config.json of the base model.
        """
        raise NotImplementedError

    def from_adapter(
        self, saved: SavedAdapter, network: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The inverse of `to_adapter`: tensors by their names in the attached model.

        Raises:
            ModelError: the adapter is of another method, or of other sizes.
        """
        raise NotImplementedError

    def merge(
        self,
        name: str,
        weight: torch.Tensor,
        kept: Mapping[str, torch.Tensor],
        network: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """A tensor of the base model with what is trained merged in; float32 inside.

        Args:
            name: in the base model's files.
            weight: of any shape and dtype; the result has its dtype.
            kept: as for `to_adapter`.
            network: config.json; it alone says what the rows of a square weight of GPT-2 are.
        """
        raise NotImplementedError


@dataclass(kw_only=True, slots=True)
class AdapterTuning(Tuning):
    """A frozen base model with something small beside it, which alone is saved.

    Attributes:
        marks: parts of the names of what is inserted: dotted components.
    """

    quantize: Quantize = Quantize.none  # storage of the frozen base
    init_from: str | None = None  # an adapter folder (or a run's) to continue

    default_lr: ClassVar[float] = 1e-4
    whole_model: ClassVar[bool] = False
    marks: ClassVar[tuple[str, ...]] = ()

    @property
    def unrestorable(self) -> str:
        """Nothing: the base is frozen."""
        return ""

    @property
    def begins_as_base(self) -> bool:
        """Whether no adapter is continued: what is new adds nothing, or multiplies by one."""
        return self.init_from is None

    def trained(self, name: str) -> bool:
        """Whether the parameter `name` was inserted."""
        return any(part in self.marks for part in name.split("."))

    def insert(self, model: nn.Module) -> None:
        """Put what is trained into the model: the hook of a method; see `attach`."""

    def attach(self, model: nn.Module) -> None:
        """Insert, freeze the rest, and continue the adapter of `init_from`, if one is named.

        Raises:
            ConfigError: the model has not what the tuning is to change.
            ModelError: the adapter to continue is of another method, or of other sizes.
        """
        self.insert(model)
        Tuning.attach(self, model)
        if self.init_from is not None:
            from posttrain_dist.tuning.adapters.adapter_folder import read_adapter

            config: Any = model.config
            saved = read_adapter(Path(self.init_from))
            tensors = self.from_adapter(saved, config.to_dict())
            own = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
            if f"{SCORE}.weight" not in tensors:  # a reward model begins with an adapter of a LM
                own = [name for name in own if name != f"{SCORE}.weight"]
            missing = [name for name in own if self.kept(name) and name not in tensors]
            if missing:
                raise ModelError(
                    f"the adapter lacks {len(missing)} tensors, such as {missing[0]}",
                    where=self.init_from,
                    fix="continue it with the targets and the model.add_tokens that it was trained "
                    "with",
                )
            unkept = [name for name in tensors if not self.kept(name)]
            if unkept:  # they would be written into the frozen base, and never saved
                raise ModelError(
                    f"the adapter holds {len(unkept)} tensors that this tuning does not train, "
                    f"such as {unkept[0]}",
                    where=self.init_from,
                    fix="continue it with the tuning that it was trained with",
                )
            fill_parameters(model, tensors, self.init_from)


def fill_parameters(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], where: str = "tuning.init_from"
) -> None:
    """Copy tensors into the parameters and buffers of their names, also those that are sharded.

    Raises:
        ModelError: the model has no such tensor, or one of another shape.
    """
    import torch

    own: dict[str, torch.Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, tensor in tensors.items():
        target = own.get(name)
        shape = None if target is None else tuple(getattr(target, "ds_shape", target.shape))
        if target is None or shape != tuple(tensor.shape):
            found = "is not in the model" if target is None else f"has the shape {shape} there"
            raise ModelError(
                f"{name} {tuple(tensor.shape)} of the adapter {found}",
                where=where,
                fix="continue it with the tuning, the base model and the model.add_tokens that it "
                "was trained with",
            )
        with torch.no_grad(), gathered(target):
            if target.numel():  # of a sharded one, rank 0 hands out what it has
                target.copy_(tensor)


def gathered(parameter: torch.Tensor) -> AbstractContextManager[Any]:
    """A context where a parameter that DeepSpeed shards is whole, and may be written."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    zero: Any = sys.modules["deepspeed"].zero  # it sharded the parameter, so it is there
    return zero.GatheredParameters([parameter], modifier_rank=0)  # type: ignore[no-any-return]


def above_zero(key: str, value: float, most: float) -> Rule:
    """The rule that a value is above 0 and at most `most`."""
    return Rule(
        0 < value <= most,
        key,
        f"is {value}, must be above 0 and at most {most:,}",
        f"set {key} to a value above 0",
    )


def virtual_tokens_rule(tokens: int) -> Rule:
    """At least one: with none there is nothing to train."""
    return at_least("tuning.tokens", tokens, 1, 10**6)


def names_rule(key: str, value: object) -> Rule:
    """The rule that a value is text, or a list of texts that are not empty."""
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, list | tuple) and all(isinstance(t, str) and t for t in texts)
    return Rule(
        good and bool(texts),
        key,
        f"is {value!r}, must be text or a list of texts",
        f"set {key}=all-linear, or for instance '{key}=[q_proj,v_proj]'",
    )
