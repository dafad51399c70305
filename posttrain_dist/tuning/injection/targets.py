"""Which linear layers of a model an adapter stands on: words, names or a pattern -> module names.

The result is a list of whole names, never a rule: what is saved says exactly what was changed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import ConfigError
from posttrain_dist.models.network.tensors import Linear, part_of

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR, ATTENTION, MLP = "all-linear", "attention", "mlp"
WORDS = (ALL_LINEAR, ATTENTION, MLP)
_WHERE = "tuning.targets"
# Of every trained architecture: where a projection holds queries, too, it is taken whole.
_KEYS_AND_VALUES = ("k_proj", "v_proj", "kv_b_proj", "qkv_proj", "query_key_value", "c_attn")
_SECOND_OF_MLP = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")


def linears(model: nn.Module) -> list[Linear]:
    """Every linear layer, in the order of the model."""
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.pytorch_utils import Conv1D

    layers = [n for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        layer = next((n for n in layers if name.startswith(f"{n}.")), None)
        part = "outside" if layer is None else part_of(name.removeprefix(f"{layer}."))
        if isinstance(module, nn.Linear):
            sizes = (module.in_features, module.out_features)
        else:
            sizes = tuple(getattr(module.weight, "ds_shape", module.weight.shape))
        bias = module.bias is not None
        found.append(Linear(name, *sizes, part, bias, isinstance(module, Conv1D)))
    return found


def find_targets(model: nn.Module, targets: str | Sequence[str]) -> list[Linear]:
    """The linear layers of a model that `targets` means; see `matching`.

    Raises:
        ConfigError: a name or the pattern matches none; the message lists what there is.
    """
    return matching(linears(model), targets, kinds_of(model))


def kinds_of(model: nn.Module) -> Callable[[str], str]:
    """What a message adds to the end of a name that is of modules, but of no linear layer."""

    def but(end: str) -> str:
        kinds = {type(m).__name__ for n, m in model.named_modules() if ends_with(n, end)}
        return f" but {' and '.join(sorted(kinds))}" if kinds else ""

    return but


def matching(
    every: list[Linear],
    targets: str | Sequence[str],
    what_it_is: Callable[[str], str] = lambda name: "",
) -> list[Linear]:
    """Those of the linear layers of a model that `targets` means, in their order.

    Args:
        targets: all-linear (those of the decoder layers, so without the head), attention, mlp, a
            list of names that end module names, or a regular expression of whole module names.
        what_it_is: see `kinds_of`.

    Raises:
        ConfigError: a name or the pattern matches none; the message lists what there is.
    """
    if isinstance(targets, str) and targets in WORDS:
        parts = {ALL_LINEAR: (ATTENTION, MLP, "layer"), ATTENTION: (ATTENTION,), MLP: (MLP,)}
        found = [one for one in every if one.part in parts[targets]]
        if not found:
            raise _no_match(f"the model has no linear layers of {targets}", every)
        return found
    if isinstance(targets, str) and not targets.isidentifier():
        found = [one for one in every if re.fullmatch(targets, one.name)]
        if not found:
            raise _no_match(f"the pattern {targets!r} matches no linear layer", every)
        return found
    names = [targets] if isinstance(targets, str) else list(targets)
    for name in names:
        if not any(ends_with(one.name, name) for one in every):
            raise _no_match(f"{name!r} is no linear layer{what_it_is(name)}", every)
    return [one for one in every if any(ends_with(one.name, name) for name in names)]


def keys_values_and_mlp(every: list[Linear]) -> tuple[list[Linear], list[Linear]]:
    """What IA3 scales: the projections to keys and values, and the second linears of the MLPs.

    Raises:
        ConfigError: there are none of either.
    """
    keys = [o for o in every if o.part == ATTENTION and _last(o.name) in _KEYS_AND_VALUES]
    second = [o for o in every if scales_input(o)]
    if not keys or not second:
        raise _no_match("the keys, values and MLPs of this model are not known by name", every)
    return keys, second


def scales_input(linear: Linear) -> bool:
    """Whether IA3 scales the input of a layer: of the second linear of an MLP."""
    return linear.part == MLP and _last(linear.name) in _SECOND_OF_MLP


def ends_with(name: str, end: str) -> bool:
    """Whether `end` is a whole number of the last components of a dotted name."""
    return name == end or name.endswith(f".{end}")


def refuse_tied(model: Any, names: Iterable[str], where: str) -> None:
    """Refuse what would train the head alone, or the embeddings alone, where they are one.

    Raises:
        ConfigError: one of the named modules has the weight that both share.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    modules = dict(model.named_modules())
    for name in names:
        if modules.get(name) in (head, embeddings):
            raise ConfigError(
                f"{name!r} shares its weight with the "
                f"{'embeddings' if modules[name] is head else 'head'} (tie_word_embeddings): "
                "changed alone, it could not go back into the model",
                where=where,
                fix=f"leave {name} out",
            )


def refuse_head(model: Any, names: Iterable[str]) -> None:
    """Refuse the head among the targets of a method that the fused loss does not know.

    Raises:
        ConfigError: one of the named modules is the head.
    """
    head = model.get_output_embeddings()
    for name in names:
        if model.get_submodule(name) is head:
            raise ConfigError(
                f"{name!r} is the head, which IA3 does not scale here",
                where=_WHERE,
                fix=f"leave {name} out, or use tuning=lora",
            )


def available(every: Iterable[Linear]) -> str:
    """The last names of linear layers, with how many of them there are."""
    counts = Counter(_last(one.name) for one in every)
    return ", ".join(f"{name} ({number})" for name, number in counts.items())


def shared_names(modules: Mapping[str, Any], ends: Sequence[str]) -> dict[str, list[str]]:
    """For each of `ends`, the modules whose names end so."""
    return {end: [name for name in modules if ends_with(name, end)] for end in ends}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _no_match(what: str, every: list[Linear]) -> ConfigError:
    return ConfigError(
        f"{what}; the model has {available(every)}",
        where=_WHERE,
        fix="use all-linear, attention, mlp, a list of these names such as '[q_proj,v_proj]', or "
        "a regular expression of whole names: 'tuning.targets=\".*[.][0-3][.].*q_proj\"'",
    )
