"""RunConfig: everything that can be set for a run, and the checks over it. Imports no torch.

A run is frozen once, by the process where the command is typed, into ONE YAML file
(`RunConfig.to_yaml`); every worker reads that text (`RunConfig.from_yaml`) and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain_dist.checkpoint import CheckpointConfig
from posttrain_dist.data import DataConfig
from posttrain_dist.engine import AdamW, DeepSpeed, Engine, Optimizer, Single
from posttrain_dist.engine.ds_config import deepspeed_config
from posttrain_dist.errors import ConfigError, PosttrainError, raise_all
from posttrain_dist.metrics import LoggingConfig
from posttrain_dist.models import ModelConfig, Weights
from posttrain_dist.models.tuning import Full, Tuning
from posttrain_dist.objectives.base import Objective
from posttrain_dist.objectives.pretrain import Pretrain
from posttrain_dist.objectives.sft import Sft

# --------------------------------------------------------------------------------- groups


@dataclass(kw_only=True, slots=True)
class Cluster:
    """The slot `cluster`: how the processes of a run come about."""


@dataclass(kw_only=True, slots=True)
class Local(Cluster):
    """This process, no Ray."""


@dataclass(kw_only=True, slots=True)
class Ray(Cluster):
    """Ray Train workers, on a local Ray or on a running cluster."""

    workers: int | None = None  # null: one per GPU of the cluster, or 1 where it has none
    address: str | None = None  # "host:port" of a running Ray; null: start one here
    cpus_per_worker: float = 1.0
    max_failures: int = 1  # times that a lost worker is replaced and the run resumed


@dataclass(kw_only=True, slots=True)
class Slurm(Ray):
    """Ray inside a Slurm job; `posttrain submit` writes the job. `address` is set in the job."""

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int = 2
    memory_per_node: str | None = None  # as Slurm's --mem: "64G"
    partition: str | None = None
    account: str | None = None
    time: str = "01:00:00"  # as Slurm's --time
    network_interface: str | None = None  # for gloo and NCCL, e.g. "eth0"; null: they choose
    extra: list[str] = field(default_factory=list)  # more sbatch options: ["--qos=high"]


class Dtype(Enum):
    """Number format of weights and activations; optimizer state is always float32."""

    auto = "auto"  # bfloat16 where the hardware multiplies it fast, else float32
    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    steps: int | None = None  # optimizer steps; null: from `epochs`
    epochs: float | None = None  # passes over the data; null: 1 if `steps` is null too
    batch_size: int = 8  # packs per optimizer step, over all ranks
    micro_batch_size: int = 1  # packs per forward per rank
    dtype: Dtype = Dtype.auto
    log_every: int = 1  # steps between lines of metrics.jsonl
    eval_every: int | None = None  # steps; null: before training and at its end only
    save_every: int | None = None  # steps; null: at the end only
    resume: str = "auto"  # auto: newest checkpoint of the run folder; never; or a checkpoint


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Held-out evaluation."""

    generate_rows: int = 0  # checkable rows per channel answered by generation, before and after
    samples: int = 3  # generated answers that are shown, of channels without one right answer
    max_new_tokens: int = 32


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A whole run. Slots (`objective`, `tuning`, ...) left alone take their first option."""

    name: str = "run"
    seed: int = 0
    output_root: str = "outputs"  # run folders are made below: <output_root>/<name>/<time>
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Objective = field(default_factory=Objective)
    tuning: Tuning = field(default_factory=Tuning)
    optimizer: Optimizer = field(default_factory=Optimizer)
    engine: Engine = field(default_factory=Engine)
    cluster: Cluster = field(default_factory=Cluster)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def to_dict(self) -> dict[str, Any]:
        """Every value as plain data, and each slot's option as its `kind`."""
        plain = _plain(dataclasses.replace(self, **_untouched_slots(self)))
        for group, options in SLOTS.items():
            value = getattr(self, group)
            kind = next((n for n, o in options.items() if type(value) is o), next(iter(options)))
            plain[group] = {"kind": kind, **plain[group]}
        return dict(plain)

    def to_yaml(self) -> str:
        """The frozen form: `to_dict` as YAML."""
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))

    @classmethod
    def from_yaml(cls, text: str) -> RunConfig:
        """Read what `to_yaml` wrote.

        Raises:
            ConfigError: a key or value that this version does not know.
        """
        try:
            values: Any = OmegaConf.to_container(OmegaConf.create(text))
            values.pop("choices", None)  # for readers: which option each group was given
            schema = OmegaConf.structured(cls)
            for group, options in SLOTS.items():
                kind = values[group].pop("kind")
                schema[group] = OmegaConf.structured(options[kind])
            merged = OmegaConf.merge(schema, values)
            return OmegaConf.to_object(merged)  # type: ignore[return-value]
        except (OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the frozen config cannot be read: {error}",
                fix="it is written by the version that started the run; use that version",
            ) from error


# The one table of options: group -> name -> dataclass. The first is the default.
SLOTS: dict[str, dict[str, type]] = {
    "objective": {"sft": Sft, "pretrain": Pretrain},
    "tuning": {"full": Full},
    "optimizer": {"adamw": AdamW},
    "engine": {"single": Single, "deepspeed": DeepSpeed},
    "cluster": {"local": Local, "ray": Ray, "slurm": Slurm},
}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    return value


# --------------------------------------------------------------------------------- checks


def complete(config: RunConfig) -> RunConfig:
    """A copy with every untouched slot filled by its first option, checked.

    Raises:
        ConfigError, SeveralErrors: all problems of the configuration, reported together.
    """
    config = dataclasses.replace(config, **_untouched_slots(config))
    raise_all(_wrong_slots(config) or problems(config))
    return config


def _untouched_slots(config: RunConfig) -> dict[str, Any]:
    """The default option of every slot that still holds its empty base."""
    bases: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(config)}
    return {
        group: next(iter(options.values()))()
        for group, options in SLOTS.items()
        if type(getattr(config, group)) is bases[group]
    }


def _wrong_slots(config: RunConfig) -> list[PosttrainError]:
    return [
        ConfigError(
            f"is {getattr(config, group)!r}",
            where=group,
            fix=f"use one of {', '.join(option.__name__ for option in options.values())}",
        )
        for group, options in SLOTS.items()
        if type(getattr(config, group)) not in options.values()
    ]


def problems(config: RunConfig) -> list[PosttrainError]:
    """Every problem that can be seen without reading data or model."""
    rules = [
        *_run_rules(config),
        *_optimizer_rules(config.optimizer),
        *_engine_rules(config.engine, config.model.weights),
        *_cluster_rules(config.cluster, config.engine),
    ]
    found: list[PosttrainError] = [
        ConfigError(what, where=key, fix=fix) for ok, key, what, fix in rules if not ok
    ]
    if isinstance(config.engine, DeepSpeed) and config.engine.config is not None:
        try:
            deepspeed_config(config.engine, clip=1.0, bf16=False)
        except ConfigError as error:
            found.append(error)
    return found


# A rule: (holds, key, what is wrong, how to mend it).
Rule = tuple[bool, str, str, str]


def _at_least(key: str, value: float | None, least: float = 1) -> Rule:
    what = f"is {value}, must be at least {least}"
    return value is None or value >= least, key, what, f"set {key} to {least} or more"


def _run_rules(config: RunConfig) -> list[Rule]:
    train, data = config.train, config.data
    return [
        _at_least("train.steps", train.steps),
        _at_least("train.batch_size", train.batch_size),
        _at_least("train.micro_batch_size", train.micro_batch_size),
        _at_least("train.log_every", train.log_every),
        _at_least("train.eval_every", train.eval_every),
        _at_least("train.save_every", train.save_every),
        _at_least("data.max_length", data.max_length, 2),
        _at_least("data.pack_window", data.pack_window),
        _at_least("eval.max_new_tokens", config.eval.max_new_tokens),
        _at_least("eval.generate_rows", config.eval.generate_rows, 0),
        _at_least("eval.samples", config.eval.samples, 0),
        _at_least("checkpoint.keep", config.checkpoint.keep, 0),
        (
            train.epochs is None or 0 < train.epochs < math.inf,
            "train.epochs",
            f"is {train.epochs}, must be above 0 and finite",
            "set a positive number of passes over the data",
        ),
        (
            train.steps is None or train.epochs is None,
            "train.epochs",
            "is set together with train.steps",
            "set one of the two",
        ),
        (
            0 <= data.eval_fraction < 1,
            "data.eval_fraction",
            f"is {data.eval_fraction}, must be in [0, 1)",
            "set a share such as 0.05",
        ),
        (
            config.name not in ("", ".", "..") and not set(config.name) & set('/\\:*?"<>| '),
            "name",
            f"is {config.name!r}: it becomes a folder's name",
            "use letters, digits, '-', '_' and '.'",
        ),
    ]


def _optimizer_rules(optimizer: Optimizer) -> list[Rule]:
    if not isinstance(optimizer, AdamW):
        return []
    ranges = {
        "lr": (0 < optimizer.lr < 10, "above 0 and below 10"),
        "beta1": (0 <= optimizer.beta1 < 1, "in [0, 1)"),
        "beta2": (0 <= optimizer.beta2 < 1, "in [0, 1)"),
        "eps": (0 < optimizer.eps < 1, "above 0 and below 1"),
        "weight_decay": (0 <= optimizer.weight_decay < math.inf, "0 or more, and finite"),
        "clip": (0 <= optimizer.clip < math.inf, "0 (no clipping) or more, and finite"),
        "warmup_ratio": (0 <= optimizer.warmup_ratio <= 1, "in [0, 1]"),
        "min_lr_ratio": (0 <= optimizer.min_lr_ratio <= 1, "in [0, 1]"),
    }
    return [
        (
            ok,
            f"optimizer.{name}",
            f"is {getattr(optimizer, name)}, must be {wanted}",
            f"set optimizer.{name} to a value {wanted}",
        )
        for name, (ok, wanted) in ranges.items()
    ]


def _engine_rules(engine: Engine, weights: Weights) -> list[Rule]:
    if not isinstance(engine, DeepSpeed):
        return []
    return [
        (
            engine.stage in (0, 1, 2, 3),
            "engine.stage",
            f"is {engine.stage}",
            "use engine=zero0, zero1, zero2 or zero3",
        ),
        (
            not engine.offload or engine.stage >= 1,
            "engine.offload",
            "needs a sharded optimizer, and engine.stage is 0",
            "use engine=zero3_offload, or engine.stage=1, 2 or 3",
        ),
        (
            not (engine.stage == 3 and weights is Weights.random),
            "model.weights",
            "is random with engine.stage=3, which draws other weights than the other engines do",
            "use engine=zero2, or make the weights once with engine=single and load them",
        ),
        _at_least("engine.persistence_threshold", engine.persistence_threshold, 0),
    ]


def _cluster_rules(cluster: Cluster, engine: Engine) -> list[Rule]:
    if not isinstance(cluster, Ray):
        return []
    rules = [
        _at_least("cluster.workers", cluster.workers),
        _at_least("cluster.max_failures", cluster.max_failures, 0),
        (
            cluster.cpus_per_worker > 0,
            "cluster.cpus_per_worker",
            f"is {cluster.cpus_per_worker}, must be above 0",
            "set it to 1 or more",
        ),
        (
            not (isinstance(engine, Single) and (cluster.workers or 1) > 1),
            "engine",
            f"single runs in one process, and cluster.workers is {cluster.workers}",
            "use engine=zero0 (or zero1, zero2, zero3), or cluster.workers=1",
        ),
    ]
    if isinstance(cluster, Slurm):
        rules += [
            _at_least("cluster.nodes", cluster.nodes),
            _at_least("cluster.cpus_per_node", cluster.cpus_per_node),
            _at_least("cluster.gpus_per_node", cluster.gpus_per_node, 0),
        ]
    return rules
