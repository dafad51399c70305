"""RunConfig: everything that can be set for a run, frozen to one YAML and read back. No torch.

A run is frozen once, by the process where the command is typed, into ONE YAML file
(`RunConfig.to_yaml`); every worker reads that text (`RunConfig.from_yaml`) and nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain_dist.checkpoint import CheckpointConfig
from posttrain_dist.config.cluster import Cluster, Local, Ray, Slurm
from posttrain_dist.config.groups import EvalConfig, TrainConfig
from posttrain_dist.config.hardware import Hardware
from posttrain_dist.data import DataConfig, Template
from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.engine import AdamW, AutoEngine, DeepSpeed, Engine, Optimizer, Single
from posttrain_dist.errors import ConfigError
from posttrain_dist.metrics import LoggingConfig
from posttrain_dist.models import ModelConfig
from posttrain_dist.objectives.base import Objective
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.objectives.preference.kto import Kto
from posttrain_dist.objectives.preference.orpo import Orpo
from posttrain_dist.objectives.preference.reward import Reward
from posttrain_dist.objectives.preference.simpo import Simpo
from posttrain_dist.objectives.pretrain import Pretrain
from posttrain_dist.objectives.sft import Sft
from posttrain_dist.tuning.auto import AutoTuning
from posttrain_dist.tuning.base import Tuning
from posttrain_dist.tuning.bottleneck import Bottleneck
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.ia3 import Ia3
from posttrain_dist.tuning.lora import Lora
from posttrain_dist.tuning.prefix_tuning import Prefix
from posttrain_dist.tuning.prompt_tuning import Prompt, PTuning


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A whole run. Slots (`objective`, `tuning`, ...) left alone take their first option."""

    name: str = "run"
    seed: int = 0
    output_root: str = "outputs"  # run folders are made below: <output_root>/<name>/<time>
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    template: Template = field(default_factory=Template)
    objective: Objective = field(default_factory=Objective)
    tuning: Tuning = field(default_factory=Tuning)
    optimizer: Optimizer = field(default_factory=Optimizer)
    engine: Engine = field(default_factory=Engine)
    cluster: Cluster = field(default_factory=Cluster)
    hardware: Hardware = field(default_factory=Hardware)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    diagnose: DiagnoseConfig = field(default_factory=DiagnoseConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def to_dict(self) -> dict[str, Any]:
        """Every value as plain data, and each slot's option as its `kind`."""
        plain = _plain(dataclasses.replace(self, **untouched_slots(self)))
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
            _refuse_loose_flags(values, merged)
            return OmegaConf.to_object(merged)  # type: ignore[return-value]
        except (OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the frozen config cannot be read: {error}",
                fix="it is written by the version that started the run; use that version",
            ) from error


# The one table of options: group -> name -> dataclass. The first is the default.
SLOTS: dict[str, dict[str, type]] = {
    "objective": {
        "sft": Sft,
        "pretrain": Pretrain,
        "dpo": Dpo,
        "orpo": Orpo,
        "simpo": Simpo,
        "kto": Kto,
        "reward": Reward,
    },
    "tuning": {
        "full": Full,
        "lora": Lora,
        "ia3": Ia3,
        "prompt": Prompt,
        "p_tuning": PTuning,
        "prefix": Prefix,
        "bottleneck": Bottleneck,
        "auto": AutoTuning,
    },
    "optimizer": {"adamw": AdamW},
    "engine": {"single": Single, "deepspeed": DeepSpeed, "auto": AutoEngine},
    "cluster": {"local": Local, "ray": Ray, "slurm": Slurm},
}
# Every group that is chosen on the command line: in one that is no slot the options differ by
# their values alone.
GROUPS: dict[str, dict[str, type]] = {
    **SLOTS,
    "template": {"template": Template},
    "hardware": {"hardware": Hardware},
}


def _refuse_loose_flags(written: dict[str, Any], read: Any) -> None:
    """OmegaConf makes true of any number but 0."""
    for name, value in written.items():
        if isinstance(value, dict):
            _refuse_loose_flags(value, read[name])
        elif isinstance(read[name], bool) and not isinstance(value, bool):
            raise TypeError(f"{name} is {value}, must be true or false")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    return value


def untouched_slots(config: RunConfig) -> dict[str, Any]:
    """The default option of every slot that still holds its empty base."""
    bases: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(config)}
    return {
        group: next(iter(options.values()))()
        for group, options in SLOTS.items()
        if type(getattr(config, group)) is bases[group]
    }
