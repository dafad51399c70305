"""The fallbacks by name, in their order, and which settings of each the planner may choose.

full ZeRO-1 -> 2 -> 3 -> 3 + CPU offload -> LoRA -> QLoRA -> QLoRA + paged optimizer

What is named stays: with tuning=lora only the engine is chosen, with engine=zero2 only the tuning.
Length, batch size and precision are nobody's choice but the user's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from posttrain_dist.config import (
    AdamW,
    AutoEngine,
    AutoTuning,
    DeepSpeed,
    Full,
    Lora,
    Quantize,
    RunConfig,
    Single,
)
from posttrain_dist.models import Checkpointing
from posttrain_dist.planner.job import Machine
from posttrain_dist.planner.make_job import count_workers
from posttrain_dist.tuning.base import AdapterTuning

MICRO_BATCH = "train.micro_batch_size"
CHECKPOINTING = "model.activation_checkpointing"
LAYERS = "model.checkpoint_layers"


@dataclass(frozen=True, slots=True)
class Method:
    """One fallback.

    Attributes:
        ways: the words of each engine that it may run on, the one that shards least first.
    """

    name: str
    ways: tuple[tuple[str, ...], ...]


def methods(config: RunConfig, machine: Machine) -> tuple[Method, ...]:
    """The fallbacks of a config, in the order in which they are tried."""
    many = workers_of_all(config, machine) > 1
    if not isinstance(config.tuning, AutoTuning):
        if not isinstance(config.engine, AutoEngine):
            return (Method(given_name(config), ((),)),)
        return _engines_of(config, machine, many=many)
    lora = tuple(f"tuning.{name}={_plain(value)}" for name, value in _auto_values(config).items())
    full = ("tuning=full", _rate(config, "full"))
    lora, qlora = ((f"tuning={name}", *lora, _rate(config, "lora")) for name in ("lora", "qlora"))
    if not isinstance(config.engine, AutoEngine):
        found = [("full", full), ("LoRA", lora), ("QLoRA", qlora)]
        named = [Method(name, (words,)) for name, words in found]
        if isinstance(config.engine, Single) and _may_page(config, machine):
            named.append(Method("QLoRA + paged optimizer", ((*qlora, "optimizer.paged=true"),)))
        return tuple(named)
    engines = _sharded(machine) if many else _alone(machine)
    return (
        *(Method(f"full{name}", ((*full, word),)) for name, word in engines),
        Method("LoRA", tuple((*lora, word) for word in _of_adapters(many))),
        Method("QLoRA", tuple((*qlora, word) for word in _of_adapters(many))),
        *_paged(config, machine, qlora, many=many),
    )


def _engines_of(config: RunConfig, machine: Machine, *, many: bool) -> tuple[Method, ...]:
    """Those of a named tuning."""
    name, tuning = tuning_name(config), config.tuning
    quantised = isinstance(tuning, AdapterTuning) and tuning.quantize is Quantize.nf4
    engines = _sharded(machine) if many else _alone(machine)
    if quantised:  # packed weights are not moved to the host and back
        engines = [(label, word) for label, word in engines if "offload" not in word]
    found = [Method(f"{name}{label}", ((word,),)) for label, word in engines]
    return (*found, *(_paged(config, machine, (), many=many, name=name) if quantised else ()))


def _sharded(machine: Machine) -> list[tuple[str, str]]:
    found = [(f" ZeRO-{stage}", f"engine=zero{stage}") for stage in (1, 2, 3)]
    return [*found, *_offloaded(" ZeRO-3", machine)]


def _alone(machine: Machine) -> list[tuple[str, str]]:
    return [("", "engine=single"), *_offloaded("", machine)]


def _offloaded(name: str, machine: Machine) -> list[tuple[str, str]]:
    if machine.gpu is None:  # the host's memory is where everything is already
        return []
    return [(f"{name} + CPU offload", "engine=zero3_offload")]


def _of_adapters(many: bool) -> tuple[str, ...]:
    return ("engine=zero1", "engine=zero2", "engine=zero3") if many else ("engine=single",)


def _paged(
    config: RunConfig,
    machine: Machine,
    words: tuple[str, ...],
    *,
    many: bool,
    name: str = "QLoRA",
) -> tuple[Method, ...]:
    """The last one: moments that leave the GPU when it is full, which one process alone can do."""
    if not _may_page(config, machine):
        return ()
    alone = ("cluster.workers=1",) if many else ()
    title = f"{name} + paged optimizer{' on one GPU' if many else ''}"
    return (Method(title, ((*words, "engine=single", *alone, "optimizer.paged=true"),)),)


def _may_page(config: RunConfig, machine: Machine) -> bool:
    optimizer = config.optimizer
    return machine.gpu is not None and isinstance(optimizer, AdamW) and not optimizer.paged


def workers_of_all(config: RunConfig, machine: Machine) -> int:
    """Ranks where the engine takes all that the cluster has."""
    return count_workers(dataclasses.replace(config, engine=DeepSpeed()), machine)[0]


def cheaper(config: RunConfig) -> list[tuple[tuple[str, ...], str]]:
    """What would save less memory than a run does: words, and the name of what saves it.

    The one that is most likely to be fast comes first.
    """
    engine, tuning, found = config.engine, config.tuning, list[tuple[tuple[str, ...], str]]()
    if isinstance(engine, DeepSpeed) and engine.stage == 3:
        name = engine_name(config)
        found = [
            ((f"engine=zero{stage}",), name) for stage in ((1, 2, 3) if engine.offload else (1, 2))
        ]
    elif isinstance(engine, DeepSpeed) and engine.offload:
        found = [((f"engine=zero{engine.stage}",), engine_name(config))]
    if isinstance(tuning, AdapterTuning) and tuning.quantize is Quantize.nf4:
        found.append((("tuning.quantize=none",), "NF4"))
    if config.model.activation_checkpointing is not Checkpointing.none:
        what = "activation checkpointing"
        found.append((("model.checkpoint_offload=false", *checkpointing_words(0, 1)), what))
    return found


# --------------------------------------------------------------------------------- the settings


def is_free(config: RunConfig, key: str, typed: Collection[str]) -> bool:
    """Whether the planner chooses a setting: it was not typed, and stands at its default.

    Args:
        key: such as "train.micro_batch_size".
        typed: keys of the command line and of its experiment; a value that is not the default
            was typed whatever they say.
    """
    group, _, name = key.partition(".")
    value, default = getattr(config, group), getattr(RunConfig(), group)
    return key not in typed and getattr(value, name) == getattr(default, name)


def chooses_checkpointing(config: RunConfig, typed: Collection[str]) -> bool:
    """Whether the planner chooses which layers recompute."""
    return all(is_free(config, key, typed) for key in (CHECKPOINTING, LAYERS))


def checkpointing_words(recomputed: int, layers: int) -> tuple[str, ...]:
    """Words that have the first `recomputed` of `layers` compute their activations again."""
    if recomputed <= 0:
        return (f"{CHECKPOINTING}={Checkpointing.none.name}",)
    if recomputed >= layers:
        return (f"{CHECKPOINTING}={Checkpointing.full.name}",)
    return (f"{CHECKPOINTING}={Checkpointing.selective.name}", f"{LAYERS}={recomputed}")


def _rate(config: RunConfig, kind: str) -> str:
    """The learning rate of a tuning: the typed one where it is meant for this, else its own."""
    assert isinstance(config.optimizer, AdamW)
    rate = config.optimizer.lr if config.optimizer.lr_for == kind else None
    tuning_lr = {"full": Full.default_lr, "lora": Lora.default_lr}[kind]
    own = config.objective.learning_rate(tuning_lr)
    return f"optimizer.lr={own if rate is None else rate!r}"


def _auto_values(config: RunConfig) -> dict[str, Any]:
    """What `tuning=auto` says of LoRA, where LoRA does not have it anyway."""
    plain, tuning = Lora(), config.tuning
    values = {field.name: getattr(tuning, field.name) for field in dataclasses.fields(tuning)}
    return {name: value for name, value in values.items() if value != getattr(plain, name)}


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value)


# ------------------------------------------------------------------------------------- the names


def given_name(config: RunConfig) -> str:
    """Of a run whose tuning and engine are named."""
    return f"{tuning_name(config)}, {engine_name(config)}"


def tuning_name(config: RunConfig) -> str:
    """As the fallbacks have it: full, LoRA, QLoRA, DoRA, prefix ..."""
    values = config.to_dict()["tuning"]
    kind = str(values["kind"])
    name = {"lora": "DoRA" if values.get("dora") else "LoRA"}.get(kind, kind)
    if values.get("quantize") == Quantize.nf4.name:
        return "QLoRA" if name == "LoRA" else f"{name} on NF4"
    return name


def engine_name(config: RunConfig) -> str:
    """As "ZeRO-3 + CPU offload"."""
    engine = config.engine
    if not isinstance(engine, DeepSpeed):
        return "one process"
    return f"ZeRO-{engine.stage}{' + CPU offload' * engine.offload}"
