"""Which reference a config means, what is refused, and what is switched off for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import pairs_config, write_pairs

from posttrain_dist.config import (
    AdamW,
    Bottleneck,
    Full,
    Ia3,
    Lora,
    ModelConfig,
    Prefix,
    Prompt,
    RunConfig,
)
from posttrain_dist.config.reference_rules import chosen_reference, is_start, reference_line
from posttrain_dist.config.rules import problems
from posttrain_dist.evaluation.heldout import evaluate
from posttrain_dist.models.architectures.dropout import switch_off_dropout
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.objectives.reference_choice import Reference
from posttrain_dist.together.compatible import check_together
from posttrain_dist.tuning.auto import AutoTuning
from posttrain_dist.tuning.lora import LoraInit

OFF, PRECOMPUTED = Reference.adapter_off, Reference.precomputed


def config_of(tuning: Any, objective: Any = None, **groups: Any) -> RunConfig:
    return RunConfig(
        objective=objective or Dpo(), tuning=tuning, optimizer=AdamW(lr=1e-4), **groups
    )


@pytest.mark.parametrize(
    ("tuning", "chosen"),
    [
        (Full(), PRECOMPUTED),
        (Lora(), OFF),
        (Lora(dora=True), OFF),
        (Ia3(), OFF),
        (Bottleneck(), OFF),
        (Lora(init=LoraInit.pissa), PRECOMPUTED),
        (Lora(modules_to_save=["norm"]), PRECOMPUTED),
        (Lora(init_from="/adapter"), PRECOMPUTED),
        (Prompt(), PRECOMPUTED),
        (Prefix(), PRECOMPUTED),
    ],
)
def test_auto_is_the_start_of_the_training(tuning: Any, chosen: Reference) -> None:
    config = config_of(tuning)
    assert chosen_reference(config) is chosen
    assert is_start(config)
    assert not [each for each in problems(config) if "reference" in str(each.where)]


def test_a_named_reference_is_not_the_start() -> None:
    for tuning in (Full(), Lora()):
        config = config_of(tuning, Dpo(reference_model="/model"))
        assert chosen_reference(config) is PRECOMPUTED
        assert not is_start(config)
    assert not is_start(config_of(Lora(init_from="/adapter"), Dpo(reference=OFF)))
    same = ModelConfig(path="/model")
    for tuning, chosen in ((Full(), PRECOMPUTED), (Lora(), OFF)):
        config = config_of(tuning, Dpo(reference_model="/model/"), model=same)
        assert chosen_reference(config) is chosen
        assert is_start(config)
        assert "/model, which training" in reference_line(config) or chosen is OFF
    config = config_of(Lora(init_from="/a"), Dpo(reference_model="/model"), model=same)
    assert chosen_reference(config) is PRECOMPUTED
    assert not is_start(config)
    tokens = ModelConfig(add_tokens=["<new>"])
    assert chosen_reference(config_of(Lora(), model=tokens)) is PRECOMPUTED


@pytest.mark.parametrize(
    ("config", "key", "why"),
    [
        (config_of(Full(), Dpo(reference=OFF)), "objective.reference", "trains the model itself"),
        (config_of(AutoTuning(), Dpo(reference=OFF)), "objective.reference", "tuning=auto"),
        (
            config_of(Lora(init=LoraInit.pissa), Dpo(reference=OFF)),
            "objective.reference",
            "changes the base weights",
        ),
        (
            config_of(Lora(modules_to_save=["norm"]), Dpo(reference=OFF)),
            "objective.reference",
            "trains norm in full",
        ),
        (
            config_of(Lora(), Dpo(reference=OFF), model=ModelConfig(add_tokens=["<a>"])),
            "objective.reference",
            "rows of added tokens",
        ),
        (
            config_of(Lora(init_from="/a"), Dpo(reference_model="/a")),
            "objective.reference_model",
            "cannot be its own reference",
        ),
        (
            config_of(Lora(), Dpo(reference=OFF, reference_model="/m")),
            "objective.reference_model",
            "the base model is the reference",
        ),
        (config_of(Prompt(ensemble=2)), "tuning.ensemble", "compares one policy"),
    ],
)
def test_what_cannot_be_had_is_refused(config: RunConfig, key: str, why: str) -> None:
    (problem,) = [each for each in problems(config) if each.where == key]
    assert why in problem.what
    assert problem.fix


def test_runs_with_a_reference_are_not_trained_together_nor_evaluated_alone(
    tmp_path: Path, tiny_llama: Path
) -> None:
    from posttrain_dist.errors import ConfigError

    rows = write_pairs(tmp_path / "pairs.jsonl", 8)
    config = pairs_config(tiny_llama, rows, Dpo(), tuning=Lora(rank=2))
    with pytest.raises(ConfigError, match="one that needs no reference"):
        check_together([config, config])
    with pytest.raises(ConfigError, match="ref_logprob_N"):
        evaluate(config, tmp_path)


def test_dropout_is_off_of_model_and_adapter(builders: Any, tmp_path: Path) -> None:
    from tuned_models import examples, tuned_policy

    from posttrain_dist.data.packs.collate import collate
    from posttrain_dist.reference.log_probs import log_probs

    folder = builders.model(tmp_path / "m", attention_dropout=0.4)
    policy = tuned_policy(folder, Lora(rank=4, dropout=0.3)).train()
    batch = collate(examples())

    def drawn() -> list[torch.Tensor]:
        return [log_probs(policy, batch) for _ in range(2)]

    assert not torch.equal(*drawn())
    found = switch_off_dropout(policy.causal_lm)
    assert policy.training
    assert torch.equal(*drawn())
    assert sorted(set(found.values())) == [0.3, 0.4]
