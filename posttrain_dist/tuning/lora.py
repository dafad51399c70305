"""LoRA (Hu et al., arXiv:2106.09685) and its family: low-rank matrices beside frozen weights.

lora        W x + scale B A x                          scale = alpha / rank
rslora      the same                                   scale = alpha / sqrt(rank)
dora        m (W + scale B A) / |W + scale B A| x      of each row its length m, trained
pissa       (W - scale B0 A0) x + scale B A x          A0, B0 the largest singular vectors of W
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain_dist.errors import ConfigError, Rule, at_least
from posttrain_dist.models.classifier import SCORE
from posttrain_dist.tuning.base import AdapterTuning, Quantize, above_zero, names_rule
from posttrain_dist.tuning.saved_adapter import SavedAdapter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from posttrain_dist.models.network.tensors import Linear

_log = logging.getLogger(__name__)
# Their names stand in checkpoints; see injection/pissa.py and models/embeddings/added_tokens.py.
_BUFFERS = ("pissa_initial_A", "pissa_initial_B", "token_ids")


class LoraInit(Enum):
    """What A and B begin with."""

    zero_b = "zero_b"  # A random, B zero: the base model, bit for bit
    pissa = "pissa"  # the largest singular vectors (Meng et al., arXiv:2404.02948)


@dataclass(kw_only=True, slots=True)
class Lora(AdapterTuning):
    """W x + scale · B A x, with W frozen; scale = alpha / rank, or alpha / sqrt(rank)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # of the input of A
    # all-linear (without the head), attention, mlp, a list of names, or a regular expression of
    # whole module names.
    targets: Any = "all-linear"
    rslora: bool = False  # scale by 1 / sqrt(rank) (Kalajdzievski, arXiv:2312.03732)
    dora: bool = False  # magnitude and direction apart (Liu et al., arXiv:2402.09353)
    init: LoraInit = LoraInit.zero_b
    lr_ratio_b: float = 1.0  # LoRA+: learning rate of B over that of A (arXiv:2402.12354)
    freeze_a: bool = False  # LoRA-FA: only B is trained (Zhang et al., arXiv:2308.03303)
    modules_to_save: list[str] = field(default_factory=list)  # trained in full beside it, by name

    marks: ClassVar[tuple[str, ...]] = (
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
        "trainable_tokens_delta",
    )

    def rules(self) -> list[Rule]:
        """Ranges, and what excludes each other; the sizes of the model are compared in `attach`."""
        return [
            at_least("tuning.rank", self.rank, 1, 10**6),
            above_zero("tuning.alpha", self.alpha, 10**6),
            above_zero("tuning.lr_ratio_b", self.lr_ratio_b, 10**6),
            Rule(
                0 <= self.dropout < 1,
                "tuning.dropout",
                f"is {self.dropout}, must be in [0, 1)",
                "set it to 0, or for instance 0.05",
            ),
            names_rule("tuning.targets", self.targets),
            _pattern_rule(self.targets),
            Rule(
                all(isinstance(name, str) and name for name in self.modules_to_save),
                "tuning.modules_to_save",
                f"is {self.modules_to_save!r}, must be names of modules",
                "set it to for instance '[norm]', or leave it out",
            ),
            *self._pissa_rules(),
        ]

    def _pissa_rules(self) -> list[Rule]:
        pissa = self.init is LoraInit.pissa
        return [
            Rule(
                not (pissa and self.freeze_a),
                "tuning.freeze_a",
                "is true, but with tuning.init=pissa A holds the directions that are to be trained",
                "set tuning.freeze_a=false or tuning.init=zero_b",
            ),
            Rule(
                not (pissa and self.dropout),
                "tuning.dropout",
                f"is {self.dropout}, but with tuning.init=pissa it would drop parts of the base "
                "model's own weights",
                "set tuning.dropout=0 or tuning.init=zero_b",
            ),
            Rule(
                not (pissa and self.quantize is not Quantize.none),
                "tuning.init",
                f"is pissa, which changes the base weights, and in {self.quantize.name} they "
                "cannot hold the change",
                "set tuning.init=zero_b or tuning.quantize=none",
            ),
            Rule(
                not (self.freeze_a and self.lr_ratio_b != 1),
                "tuning.lr_ratio_b",
                f"is {self.lr_ratio_b}, but tuning.freeze_a leaves only B to be trained",
                "set optimizer.lr, which is then that of B, and tuning.lr_ratio_b=1",
            ),
        ]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def effect(self) -> str:
        """The scale, which alpha alone does not tell."""
        return (
            f"effective scale alpha / {'sqrt(rank)' if self.rslora else 'rank'} = {self.scale:.4g}"
        )

    # -------------------------------------------------------------------- parameters, by name

    def trained(self, name: str) -> bool:
        """What was inserted, but for the A of LoRA-FA, and the modules trained in full."""
        parts = name.split(".")
        if self.freeze_a and "lora_A" in parts:
            return False
        return any(part in self.marks for part in parts) or self._saved_in_full(name)

    def kept(self, name: str) -> bool:
        """What is trained, a frozen A, what PiSSA began with, and which tokens were added."""
        parts = name.split(".")
        return "lora_A" in parts or parts[-1] in _BUFFERS or self.trained(name)

    def lr_ratio(self, name: str) -> float:
        """B learns `lr_ratio_b` times as fast as the rest."""
        return self.lr_ratio_b if "lora_B" in name.split(".") else 1.0

    @property
    def unrestorable(self) -> str:
        """What LoRA changes of the base itself."""
        if self.init is LoraInit.pissa:
            return "changes the base weights (tuning.init=pissa)"
        if self.modules_to_save:
            return f"trains {', '.join(self.modules_to_save)} in full (tuning.modules_to_save)"
        return ""

    @property
    def begins_as_base(self) -> bool:
        """Whether B begins with zeros, and no adapter is continued."""
        return self.init_from is None and self.init is LoraInit.zero_b

    def _saved_in_full(self, name: str) -> bool:
        """Whether the parameter is of one of `modules_to_save`, or of a module inside one."""
        path = name.rpartition(".")[0].split(".")
        modules = [".".join(path[: i + 1]) for i in range(len(path))]
        return any(
            module == end or module.endswith(f".{end}")
            for end in self.modules_to_save
            for module in modules
        )

    # ------------------------------------------------------------------------------ the model

    def check_network(self, network: Mapping[str, Any]) -> None:
        """Find the targets in the modules of config.json, and refuse what `insert` would."""
        from posttrain_dist.tuning.injection.empty_model import empty_model, surely_fits
        from posttrain_dist.tuning.injection.targets import WORDS

        if self.init is LoraInit.pissa and network.get("quantization_config"):
            raise ConfigError(
                "is pissa, which changes the base weights, and those of this folder are quantised",
                where="tuning.init",
                fix="set tuning.init=zero_b, or use the model in 16 bits",
            )
        by_word = isinstance(self.targets, str) and self.targets in WORDS
        named = [name for name in self.modules_to_save if name != SCORE]  # of a reward model
        if by_word and not named and surely_fits(network, self.rank):
            return
        model = empty_model(network)
        if model is not None:
            self._find_targets(model)

    def insert(self, model: nn.Module) -> None:
        """Put A and B beside the targets.

        Raises:
            ConfigError: a target is not there, is too small for the rank, or cannot be changed.
        """
        from posttrain_dist.models.embeddings.added_tokens import train_added_rows
        from posttrain_dist.tuning.injection.inject import inject, quiet_import

        targets = self._find_targets(model)
        quiet_import()
        inject(self._peft_config([target.name for target in targets]), model, self.marks)
        if self.init is LoraInit.pissa:
            from posttrain_dist.tuning.injection.pissa import begin_with_singular_vectors

            begin_with_singular_vectors(model, self.scale)
        train_added_rows(model, self._saved_in_full)
        self._log_scale(len(targets))

    def attach(self, model: nn.Module) -> None:
        """Insert, freeze, continue; PiSSA's initial product leaves the base weights last.

        By then A0 and B0 are those of the adapter that is continued, if one is.
        """
        AdapterTuning.attach(self, model)
        if self.init is LoraInit.pissa:
            from posttrain_dist.tuning.injection.pissa import subtract_initial

            subtract_initial(model, self.scale)

    def off(self, model: nn.Module) -> AbstractContextManager[None]:
        """The layers give what their frozen linears give."""
        from posttrain_dist.tuning.injection.inject import switched_off

        return switched_off(model, "lora_A")

    def _peft_config(self, targets: list[str]) -> Any:
        import peft

        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            use_rslora=self.rslora,
            use_dora=self.dora,
        )

    def _find_targets(self, model: nn.Module) -> list[Linear]:
        from posttrain_dist.tuning.injection.targets import find_targets

        targets = find_targets(model, self.targets)
        self._check_sizes(targets)
        self._check_modules(model, targets)
        return targets

    def _check_sizes(self, targets: list[Linear]) -> None:
        smallest = min(targets, key=lambda one: min(one.in_features, one.out_features))
        most = min(smallest.in_features, smallest.out_features)
        if self.rank > most:
            raise ConfigError(
                f"is {self.rank}, above the smaller dimension of {smallest.name} "
                f"({smallest.in_features} -> {smallest.out_features})",
                where="tuning.rank",
                fix=f"set tuning.rank={most} or less, or other tuning.targets",
            )

    def _check_modules(self, model: Any, targets: list[Linear]) -> None:
        """Targets and modules to save exist, are two things, and can be trained alone."""
        from posttrain_dist.tuning.injection.targets import refuse_tied, shared_names

        names = [target.name for target in targets]
        refuse_tied(model, names, "tuning.targets")
        head = model.get_output_embeddings()
        if self.dropout and any(model.get_submodule(name) is head for name in names):
            raise ConfigError(
                f"is {self.dropout}, but the head is a target, and the fused loss has no dropout",
                where="tuning.dropout",
                fix="set tuning.dropout=0, or leave the head out of tuning.targets",
            )
        where = "tuning.modules_to_save"
        modules = dict(model.named_modules())
        for end, found in shared_names(modules, self.modules_to_save).items():
            parameters = [p for name in found for p in modules[name].parameters()]
            if not parameters:
                with_some = (
                    n for n, m in modules.items() if next(m.parameters(), None) is not None
                )
                has = sorted({name.rpartition(".")[2] for name in with_some if name})
                raise ConfigError(
                    f"{end!r} is no module with parameters; the model has "
                    + ", ".join(one for one in has if not one.isdigit()),
                    where=where,
                    fix="name one of these, for instance '[norm]'",
                )
            refuse_tied(model, found, where)
            inside = [n for n in names for m in found if n == m or n.startswith(f"{m}.")]
            packed = any(not parameter.is_floating_point() for parameter in parameters)
            if inside or packed or any(type(p).__name__ == "Params4bit" for p in parameters):
                why = f"{inside[0]} is a target, too" if inside else "its weights are quantised"
                raise ConfigError(
                    f"{end!r} cannot be trained in full: {why}",
                    where=where,
                    fix="leave it out of one of the two lists" if inside else f"leave {end} out",
                )

    def _log_scale(self, num_targets: int) -> None:
        divisor = "sqrt(rank)" if self.rslora else "rank"
        _log.info(
            "LoRA on %d linear layers, rank %d: effective scale alpha/%s = %.4g",
            *(num_targets, self.rank, divisor, self.scale),
        )

    # ------------------------------------------------------------------------------ the files

    def to_adapter(
        self, kept: Mapping[str, torch.Tensor], network: Mapping[str, Any]
    ) -> SavedAdapter:
        """The adapter that plain `peft` loads with the same logits.

        PiSSA's is plain LoRA of twice the rank, [A, A0] and [B, -B0]: `peft` and every engine load
        it on the base model that the files hold, and nothing is lost.
        """
        from posttrain_dist.tuning.injection.lora_files import to_files

        return to_files(self, kept, network)

    def from_adapter(
        self, saved: SavedAdapter, network: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Tensors by their names in the attached model.

        Raises:
            ModelError: the adapter is of another method, rank or scale, or changes the base.
        """
        from posttrain_dist.tuning.injection.lora_files import from_files

        return from_files(self, saved)

    def merge(
        self,
        name: str,
        weight: torch.Tensor,
        kept: Mapping[str, torch.Tensor],
        network: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """The base tensor with A and B in it, or as it was trained in full."""
        from posttrain_dist.models.embeddings.added_tokens import merged_rows
        from posttrain_dist.tuning.injection.inject import base_name
        from posttrain_dist.tuning.injection.low_rank import LowRank, is_turned

        own = base_name(kept, name)
        if own in kept:
            return kept[own].to(weight)
        grown = merged_rows(own, weight, kept)
        if grown is not None:
            return grown
        module, _, leaf = own.rpartition(".")
        low_rank = LowRank.of(kept, module) if leaf == "weight" else None
        if low_rank is None:
            return weight
        sizes = (low_rank.b.shape[0], low_rank.a.shape[1])
        if is_turned(weight, own, sizes, network):
            return low_rank.merged(weight.T, self.scale).T.contiguous().to(weight.dtype)
        return low_rank.merged(weight, self.scale).to(weight.dtype)


def _pattern_rule(targets: object) -> Rule:
    """A single text that is no name is a regular expression, and compiles."""
    problem = ""
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except re.error as error:
        problem = str(error)
    return Rule(
        not problem,
        "tuning.targets",
        f"is {targets!r}, no regular expression: {problem}",
        "correct the pattern, or list names: '[q_proj,v_proj]'",
    )
