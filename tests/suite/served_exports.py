"""Exports of a model as it is, with the chat templates of data that was prepared for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from posttrain_dist.checkpoint.hf_folder import RunFacts, write_hf_folder
from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.data import Template
from posttrain_dist.data.chat.rendering.served import Served
from posttrain_dist.engine import Single
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare


def config_of(model: Path, rows: Path, **template: Any) -> RunConfig:
    return complete(
        RunConfig(
            model=ModelConfig(path=str(model)),
            data=DataConfig(train=str(rows), max_length=96),
            template=Template(**template),
            train=TrainConfig(steps=1, batch_size=2),
            logging=LoggingConfig(wandb=WandbMode.off),
            engine=Single(),
        )
    )


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def prompt_of(tokenizer: Any, messages: list[dict[str, Any]], **variables: Any) -> str:
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **variables
    )
    return text


def write(model: Path, folder: Path, served: Served) -> Path:
    """An export of the model as it is."""
    from safetensors.torch import load_file

    tensors, facts = load_file(model / "model.safetensors"), RunFacts(served=served)
    return write_hf_folder(
        tensors.items(), model, folder / "export", dtype=torch.float32, facts=facts
    )


def served_of(config: RunConfig, folder: Path) -> Served:
    prepare(config, folder / "prepared")
    served = Served.read(folder / "prepared")
    assert served is not None
    return served
