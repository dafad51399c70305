"""RunConfig, its groups, and what must hold among their values. Imports no torch."""

from posttrain_dist.checkpoint import CheckpointConfig
from posttrain_dist.config.cluster import Local, Placement, Ray, Slurm
from posttrain_dist.config.groups import Dtype, EvalConfig, TrainConfig
from posttrain_dist.config.hardware import Hardware
from posttrain_dist.config.rules import complete, problems, refuse_auto, single_process_rule
from posttrain_dist.config.run_config import GROUPS, SLOTS, RunConfig
from posttrain_dist.config.value_types import type_name
from posttrain_dist.data import DataConfig, Template
from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.engine import AdamW, AutoEngine, DeepSpeed, Single
from posttrain_dist.metrics import LoggingConfig
from posttrain_dist.models import ModelConfig
from posttrain_dist.objectives.pretrain import Pretrain
from posttrain_dist.objectives.sft import Sft
from posttrain_dist.tuning.auto import AutoTuning
from posttrain_dist.tuning.base import Quantize
from posttrain_dist.tuning.bottleneck import Bottleneck
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.ia3 import Ia3
from posttrain_dist.tuning.lora import Lora
from posttrain_dist.tuning.prefix_tuning import Prefix
from posttrain_dist.tuning.prompt_tuning import Prompt, PTuning

__all__ = [
    "GROUPS",
    "SLOTS",
    "AdamW",
    "AutoEngine",
    "AutoTuning",
    "Bottleneck",
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeed",
    "DiagnoseConfig",
    "Dtype",
    "EvalConfig",
    "Full",
    "Hardware",
    "Ia3",
    "Local",
    "LoggingConfig",
    "Lora",
    "ModelConfig",
    "PTuning",
    "Placement",
    "Prefix",
    "Pretrain",
    "Prompt",
    "Quantize",
    "Ray",
    "RunConfig",
    "Sft",
    "Single",
    "Slurm",
    "Template",
    "TrainConfig",
    "complete",
    "problems",
    "refuse_auto",
    "single_process_rule",
    "type_name",
]
