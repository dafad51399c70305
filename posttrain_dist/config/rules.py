"""What must hold in a whole configuration: each group's rules, and those between groups. No torch.

A group's own rules stand beside its dataclass.
"""

from __future__ import annotations

import dataclasses

from posttrain_dist.checkpoint import checkpoint_rules
from posttrain_dist.config.cluster import Ray, cluster_rules
from posttrain_dist.config.groups import eval_rules, train_rules
from posttrain_dist.config.hardware import hardware_rules, nodes_rules, with_nodes
from posttrain_dist.config.job_rules import job_rules
from posttrain_dist.config.reference_rules import reference_rules
from posttrain_dist.config.run_config import SLOTS, RunConfig, untouched_slots
from posttrain_dist.config.value_types import type_problems
from posttrain_dist.data import answer_rules, data_rules, template_rules
from posttrain_dist.diagnosis.rule_table import diagnose_problems
from posttrain_dist.engine import (
    AdamW,
    AutoEngine,
    DeepSpeed,
    Single,
    engine_rules,
    optimizer_engine_rule,
    optimizer_rules,
)
from posttrain_dist.engine.ds_config import deepspeed_config
from posttrain_dist.errors import ConfigError, PosttrainError, Rule, at_least, raise_all
from posttrain_dist.flow import By
from posttrain_dist.models import Weights, model_rules
from posttrain_dist.models.classifier import SCORE
from posttrain_dist.tuning.auto import AutoTuning
from posttrain_dist.tuning.base import AdapterTuning, Quantize
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.lora import Lora

MAX_SEED = (1 << 63) - 1  # torch and numpy take it
MAX_NAME_BYTES = 200  # a folder's name has 255, and longer ones are made of it


def complete(config: RunConfig) -> RunConfig:
    """A copy with every untouched slot filled by its first option, checked.

    Raises:
        ConfigError, SeveralErrors: all problems of the configuration, reported together.
    """
    config = dataclasses.replace(config, **untouched_slots(config))
    raise_all(_wrong_slots(config) or list(type_problems(config)) or problems(config))
    config = dataclasses.replace(config, cluster=with_nodes(config.cluster, config.hardware))
    return _with_learning_rate(_with_scalar_head(config))


def _with_scalar_head(config: RunConfig) -> RunConfig:
    """The new head of a reward model is trained in full, beside LoRA too."""
    tuning = config.tuning
    if not (config.objective.own_rows and isinstance(tuning, Lora)):
        return config
    modules = list(dict.fromkeys([*tuning.modules_to_save, SCORE]))
    return dataclasses.replace(config, tuning=dataclasses.replace(tuning, modules_to_save=modules))


def refuse_auto(config: RunConfig) -> RunConfig:
    """The config of a run that trains: what is `auto` was chosen before.

    Raises:
        ConfigError, SeveralErrors: something is still to be chosen.
    """
    auto = {"tuning": config.tuning, "engine": config.engine}
    raise_all(
        [
            ConfigError(
                "is auto, which is chosen before a run begins, and not by a worker",
                where=group,
                fix="start with posttrain train or posttrain_dist.run.run, which plan first",
            )
            for group, option in auto.items()
            if isinstance(option, AutoTuning | AutoEngine)
        ]
    )
    return config


def _with_learning_rate(config: RunConfig) -> RunConfig:
    """The learning rate of tuning and objective, where none is set and the tuning is known."""
    optimizer, auto = config.optimizer, isinstance(config.tuning, AutoTuning)
    if auto or not isinstance(optimizer, AdamW) or optimizer.lr is not None:
        return config
    rate = config.objective.learning_rate(config.tuning.default_lr)
    chosen = dataclasses.replace(optimizer, lr=rate)
    return dataclasses.replace(config, optimizer=chosen)


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
    found: list[PosttrainError] = [rule.error() for rule in all_rules(config) if not rule.holds]
    found += diagnose_problems(config.diagnose)
    if isinstance(config.engine, DeepSpeed) and config.engine.config is not None:
        try:
            deepspeed_config(config.engine, clip=1.0, bf16=False)
        except ConfigError as error:
            found.append(error)
    return found


def all_rules(config: RunConfig) -> list[Rule]:
    """Every rule, those that hold included."""
    return [
        *train_rules(config.train),
        *data_rules(config.data),
        *template_rules(config.template),
        *eval_rules(config.eval),
        *checkpoint_rules(config.checkpoint),
        *model_rules(config.model),
        *optimizer_rules(config.optimizer),
        *config.tuning.rules(),
        *config.objective.rules(),
        *engine_rules(config.engine),
        *cluster_rules(config.cluster),
        *job_rules(config.cluster),
        *hardware_rules(config.hardware),
        *nodes_rules(config.hardware, config.cluster),
        *_rules_between_groups(config),
    ]


def single_process_rule(num_workers: int | None, workers: str) -> Rule:
    """engine=single runs in one process.

    Args:
        num_workers: None: not known yet.
        workers: how the number comes about, as the end of the sentence.
    """
    return Rule(
        (num_workers or 1) <= 1,
        "engine",
        f"single runs in one process, and {workers}",
        "use engine=zero0 (or zero1, zero2, zero3), or cluster.workers=1",
    )


def single_on_many(workers: int) -> ConfigError:
    """The refusal of engine=single where the cluster makes several workers of itself."""
    started = f"{workers} workers would start, one for each GPU or node"
    return single_process_rule(workers, started).error()


def _added_tokens_rule(config: RunConfig) -> Rule:
    return Rule(
        not config.model.add_tokens or isinstance(config.tuning, Full | Lora | AutoTuning),
        "model.add_tokens",
        "adds tokens, and this tuning would never train their embeddings",
        "use tuning=lora, which trains their rows alone, or tuning=full",
    )


def _scalar_head_rule(config: RunConfig) -> Rule:
    return Rule(
        not config.objective.own_rows or isinstance(config.tuning, Full | Lora | AutoTuning),
        "tuning",
        "would keep the new head of the reward model as it was drawn",
        "use tuning=lora, which trains the head in full beside it, or tuning=full",
    )


def _dropout_rule(config: RunConfig) -> Rule:
    dropout = config.tuning.dropout if isinstance(config.tuning, Lora) else 0.0
    return Rule(
        not config.objective.no_dropout or dropout == 0,
        "tuning.dropout",
        f"is {dropout}, and objective={config.objective.name} compares with a reference, which "
        "dropout would make random",
        "set tuning.dropout=0",
    )


def _rules_between_groups(config: RunConfig) -> list[Rule]:
    engine, cluster, model = config.engine, config.cluster, config.model
    stage3 = isinstance(engine, DeepSpeed) and engine.stage == 3
    asks = config.eval.generate_rows > 0
    rules = [
        at_least("seed", config.seed, 0, MAX_SEED),
        Rule(
            not asks or config.checkpoint.export,
            "eval.generate_rows",
            f"is {config.eval.generate_rows}, and answers come from the export, which "
            "checkpoint.export=false leaves out",
            "set checkpoint.export=true, or eval.generate_rows=0",
        ),
        Rule(
            not asks or config.objective.trains_answers,
            "eval.generate_rows",
            f"is {config.eval.generate_rows}, and what objective={config.objective.name} trains "
            "answers no conversations",
            "set eval.generate_rows=0, or objective=sft",
        ),
        Rule(
            config.name not in ("", ".", "..")
            and len(config.name.encode()) <= MAX_NAME_BYTES
            and not set(config.name) & set('/\\:*?"<>| '),
            "name",
            f"is {config.name!r}: it becomes a folder's name",
            f"use letters, digits, '-', '_' and '.', {MAX_NAME_BYTES} bytes at most",
        ),
        Rule(
            not (model.compile and stage3),
            "model.compile",
            "is on, and ZeRO-3 gathers the weights by hooks that a compiled program would not run",
            "set model.compile=false, or use engine=zero2",
        ),
        Rule(
            not (model.weights is Weights.random and stage3),
            "model.weights",
            "is random with engine.stage=3, which draws other weights than the other engines do",
            "use engine=zero2, or make the weights once with engine=single and load them",
        ),
    ]
    rules += answer_rules(config.data, config.template, config.objective.rows)
    rules += [_added_tokens_rule(config), _scalar_head_rule(config), _dropout_rule(config)]
    rules += reference_rules(config)
    rules.append(optimizer_engine_rule(config.optimizer, engine))
    if isinstance(config.tuning, AdapterTuning):
        rules += _quantize_rules(config, config.tuning)
    needed = ", ".join(each.name for each in config.objective.extra if each.by is By.source)
    rules.append(
        Rule(
            not needed,
            "objective",
            f"needs {needed} with every sample, and data files have no such field",
            "train it from a source that fills Example.extra",
        )
    )
    if isinstance(engine, Single) and isinstance(cluster, Ray):
        workers = f"cluster.workers is {cluster.workers}"
        rules.append(single_process_rule(cluster.workers, workers))
    return rules


def _quantize_rules(config: RunConfig, tuning: AdapterTuning) -> list[Rule]:
    return [
        Rule(
            tuning.quantize is Quantize.none or config.model.weights is Weights.load,
            "tuning.quantize",
            "is nf4, and model.weights is random: weights that are not trained, and mean nothing",
            "set model.weights=load, or tuning.quantize=none",
        ),
    ]
