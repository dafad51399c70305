"""What must hold among the values of a configuration, as data: seen without files. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from posttrain_dist.config.groups import Cluster, Ray, Slurm
from posttrain_dist.data import DataConfig
from posttrain_dist.engine import AdamW, DeepSpeed, Engine, Optimizer, Single
from posttrain_dist.models import Checkpointing, ModelConfig, Weights

if TYPE_CHECKING:
    from posttrain_dist.config import RunConfig

# A rule: (holds, key, what is wrong, how to mend it).
Rule = tuple[bool, str, str, str]


def _at_least(key: str, value: float | None, least: float = 1) -> Rule:
    what = f"is {value}, must be at least {least}"
    return value is None or value >= least, key, what, f"set {key} to {least} or more"


def all_rules(config: RunConfig) -> list[Rule]:
    """Every rule, those that hold included."""
    return [
        *_run_rules(config),
        *_model_rules(config.model, config.engine),
        *_source_rules(config.data),
        *_optimizer_rules(config.optimizer),
        *_engine_rules(config.engine, config.model.weights),
        *_cluster_rules(config.cluster, config.engine),
    ]


def _run_rules(config: RunConfig) -> list[Rule]:
    train, data = config.train, config.data
    return [
        _at_least("train.steps", train.steps),
        _at_least("train.tokens", train.tokens),
        _at_least("train.batch_size", train.batch_size),
        _at_least("train.micro_batch_size", train.micro_batch_size),
        _at_least("train.log_every", train.log_every),
        _at_least("train.eval_every", train.eval_every),
        _at_least("train.save_every", train.save_every),
        _at_least("data.max_length", data.max_length, 2),
        _at_least("data.pack_window", data.pack_window),
        _at_least("data.workers", data.workers),
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
            [train.steps, train.epochs, train.tokens].count(None) >= 2,
            "train.steps",
            "is set together with train.epochs or train.tokens",
            "set one of the three",
        ),
        (
            config.eval.generate_rows <= 256,
            "eval.generate_rows",
            f"is {config.eval.generate_rows}: of each channel 256 held-out rows are kept as text",
            "set eval.generate_rows to 256 or less",
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


def _model_rules(model: ModelConfig, engine: Engine) -> list[Rule]:
    selective = model.activation_checkpointing is Checkpointing.selective
    key = "model.checkpoint_layers"
    return [
        (
            not selective or model.checkpoint_layers is not None,
            key,
            "is null, and model.activation_checkpointing is selective",
            "set how many layers recompute their activations",
        ),
        (
            selective or model.checkpoint_layers is None,
            key,
            f"is {model.checkpoint_layers}, and model.activation_checkpointing is "
            f"{model.activation_checkpointing.name}",
            "set model.activation_checkpointing=selective",
        ),
        _at_least(key, model.checkpoint_layers),
        (
            not (model.compile and isinstance(engine, DeepSpeed) and engine.stage == 3),
            "model.compile",
            "is on, and ZeRO-3 gathers the weights by hooks that a compiled program would not run",
            "set model.compile=false, or use engine=zero2",
        ),
    ]


def _source_rules(data: DataConfig) -> list[Rule]:
    rules = [
        (
            not data.sources or data.train == DataConfig().train,
            "data.sources",
            "is set together with data.train",
            "give all training rows as sources, or none",
        ),
        (
            not data.sources or any(source.weight > 0 for source in data.sources.values()),
            "data.sources",
            "holds no source of a weight above 0",
            "give at least one source a weight",
        ),
        ("eval" not in data.sources, "data.sources.eval", "is a reserved name", "rename it"),
    ]
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        weights = {"weight": source.weight}
        weights |= {f"schedule.{step}": weight for step, weight in source.schedule.items()}
        rules += [
            (
                0 <= weight < math.inf,
                f"{key}.{place}",
                f"is {weight}, must be 0 or more, and finite",
                "set a weight such as 1.0",
            )
            for place, weight in weights.items()
        ]
        rules.append(
            (
                source.max_passes is None or source.max_passes > 0,
                f"{key}.max_passes",
                f"is {source.max_passes}, must be above 0",
                "set how often a row may be drawn in an epoch, or null",
            )
        )
    return rules


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
