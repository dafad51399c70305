"""Words that the planner applies itself do what Hydra makes of them on a command line."""

from __future__ import annotations

from dataclasses import replace

import pytest
from posttrain_launch.compose.composer import Composer, to_composed, without_hydra

from posttrain_dist.config import AdamW, RunConfig, complete
from posttrain_dist.planner.overriding import OPTIONS, with_words

WORDS = [
    *((f"{group}={option}",) for group, options in OPTIONS.items() for option in options),
    ("tuning=lora", "tuning.rank=64", "tuning.targets=[q_proj,v_proj]", "optimizer.lr=1e-05"),
    ("model.activation_checkpointing=selective", "model.checkpoint_layers=3"),
    ("engine=single", "optimizer.paged=true", "train.micro_batch_size=4"),
    ("cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=8"),
]

START = replace(RunConfig(), optimizer=AdamW())


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_they_are_those_of_hydra(words):
    with Composer() as composer:
        config = composer.compose(list(words))
        hydra = config.hydra
        composed = to_composed(without_hydra(config), hydra).config
    assert complete(with_words(START, words)) == complete(composed)


def test_a_mode_that_is_not_selective_takes_the_number_of_layers_away():
    some = with_words(START, WORDS[-3])
    assert some.model.checkpoint_layers == 3
    assert (
        with_words(some, ("model.activation_checkpointing=full",)).model.checkpoint_layers is None
    )
