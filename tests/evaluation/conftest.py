"""A small base model, held-out rows, and random adapters of plain `peft`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_scores import config_of
from transformers import AutoModelForCausalLM

from posttrain_dist.config import RunConfig
from posttrain_dist.prepare import prepare


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, builders: Any) -> Path:
    """A base whose rows are blocks of NF4."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return builders.model(tmp_path_factory.mktemp("wide"), **sizes)


@pytest.fixture(scope="module")
def config(wide: Path, rows_file: Path) -> RunConfig:
    return config_of(wide, rows_file)


@pytest.fixture(scope="module")
def prepared(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(config, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """adapter(name, config): a random adapter, made and saved by plain `peft`."""
    from peft import get_peft_model

    root = tmp_path_factory.mktemp("adapters")

    def make(name: str, peft_config: Any) -> Path:
        torch.manual_seed(len(name))
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(wide), peft_config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(root / name)
        return root / name

    return make
