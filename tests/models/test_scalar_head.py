"""The scalar head on every architecture that transformers has a sequence classifier of."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob
from small_configs import small_config

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Example
from posttrain_dist.models.architectures.known import TRAINED
from posttrain_dist.models.attention import EAGER, register
from posttrain_dist.models.classifier import WITHOUT_CLASS, check_kind, classifier_network
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.policy import Policy

SAMPLE = {"gpt2", "opt", "gpt_neox", "stablelm", "nemotron", "gemma3_text"}
TYPES = sorted(TRAINED - WITHOUT_CLASS)
KERNELS = HeadKernels(linear_cross_entropy, linear_logprob)


def test_the_table_is_that_of_transformers():
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES,
    )

    assert {t for t in TRAINED if t not in NAMES} == WITHOUT_CLASS


def test_a_type_without_a_classifier_is_refused(tmp_path):
    with pytest.raises(ModelError, match="ForSequenceClassification of the type cohere"):
        check_kind({"model_type": "cohere"}, tmp_path, scalar=True)
    with pytest.raises(ModelError, match="of the type cohere"):
        classifier_network({"model_type": "cohere"})
    made = classifier_network({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    assert made["architectures"] == ["GPT2ForSequenceClassification"]


def forest():
    """A prompt, and two answers behind it whose last token is a target."""
    draw = np.random.default_rng(0)
    found = []
    for i, length in enumerate((7, 4, 6)):
        weight_L = np.zeros(length, np.float32)
        weight_L[-1] = i > 0
        ids_L = draw.integers(5, 200, length).astype(np.int32)
        parent = 0 if i else None
        found.append(Example(ids_L, weight_L, 0, i, parent=parent, unit=0))
    return collate(found, own_rows=True)


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(t, marks=() if t in SAMPLE else [pytest.mark.slow]) for t in TYPES],
)
def test_rewards_of_a_forest_and_their_gradient_are_those_of_transformers_alone(model_type):
    import transformers

    register()
    config = small_config(model_type)
    config.num_labels, config.pad_token_id = 1, None
    auto, models = transformers.AutoModelForSequenceClassification, []
    for attention in (EAGER, "eager"):
        model = auto.from_config(copy.deepcopy(config), attn_implementation=attention)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.5))
        models.append(model.eval())
    ours, alone = models
    batch = forest()
    policy = Policy(ours, KERNELS, 1)
    rewards = policy.head.reward(policy.hidden(batch))[:2]
    (rewards[0] - rewards[1]).backward()
    bounds, ids = batch.cu_seqlens_S, batch.input_ids_T
    expected = torch.cat(
        [
            alone(input_ids=torch.cat([ids[: bounds[1]], ids[bounds[i] : bounds[i + 1]]])[None])
            .logits.reshape(1)
            .float()
            for i in (1, 2)
        ]
    )
    (expected[0] - expected[1]).backward()
    torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-4)
    own = dict(ours.named_parameters())
    for name, parameter in alone.named_parameters():
        if parameter.grad is not None:
            norm = float(parameter.grad.norm())
            apart = float((own[name].grad - parameter.grad).norm())
            assert apart <= 1e-3 * norm + 1e-4, name
    assert policy.check_head(batch) < 1e-3
