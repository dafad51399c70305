"""Learning rate and parameter groups against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain_dist.engine import AdamW, DeepSpeed, Schedule, optimizer_rules
from posttrain_dist.engine.ds_config import deepspeed_config
from posttrain_dist.engine.optimizers import (
    ParameterRules,
    learning_rate,
    parameter_groups,
    trained_parameters,
    warmup_steps,
)
from posttrain_dist.errors import ConfigError


def test_cosine_rises_linearly_peaks_and_ends_at_its_floor():
    config = AdamW(lr=1.0, warmup_ratio=0.1, min_lr_ratio=0.2)
    rates = [learning_rate(config, step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[54] == pytest.approx(0.2 + 0.8 / 2)  # half way: step 55 of 10..100
    assert rates[99] == pytest.approx(0.2)
    assert rates[32] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 23 / 90)) / 2)


def test_linear_and_constant():
    linear = AdamW(lr=2.0, warmup_ratio=0.0, min_lr_ratio=0.0, schedule=Schedule.linear)
    assert [learning_rate(linear, k, 4) for k in (1, 2, 3, 4)] == [1.5, 1.0, 0.5, 0.0]
    constant = AdamW(lr=2.0, warmup_ratio=0.5, schedule=Schedule.constant)
    assert [learning_rate(constant, k, 4) for k in (1, 2, 3, 4)] == [1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("steps", [0, 1, 4, 10, 1000])
def test_warmup_steps_rise_to_the_peak_in_so_many(steps):
    config = AdamW(lr=1.0, warmup_steps=steps, schedule=Schedule.constant)
    rates = [learning_rate(config, k, 10) for k in range(1, 11)]
    assert rates == pytest.approx([min(1.0, k / max(1, steps)) for k in range(1, 11)])


def test_a_warmup_is_a_share_or_a_number_of_steps():
    def refused(**fields):
        return [rule.error() for rule in optimizer_rules(AdamW(**fields)) if not rule.holds]

    assert refused(warmup_steps=3) == refused(warmup_ratio=0.5) == []
    (both,) = refused(warmup_steps=3, warmup_ratio=0.0)
    assert str(both) == (
        "optimizer.warmup_steps: is 3, and optimizer.warmup_ratio is 0.0\n"
        "  fix: set one of the two, and the other to null"
    )
    # Neither: three hundredths of the run, rounded up.
    assert [warmup_steps(AdamW(), total) for total in (1, 100, 101, 1000)] == [1, 3, 4, 30]


def test_norms_and_biases_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model[0].weight.ds_shape = torch.Size([2, 3])
    model[1].weight.requires_grad_(False)
    named = trained_parameters(model)
    decayed, plain = parameter_groups(named, 0.1, ParameterRules())
    assert decayed["params"] == [model[0].weight] and decayed["weight_decay"] == 0.1
    assert plain["params"] == [model[0].bias, model[1].bias] and plain["weight_decay"] == 0.0


def test_a_deepspeed_json_is_merged_in(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        '{"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": true}'
    )
    made = deepspeed_config(DeepSpeed(stage=2, config=str(path)), clip=0.5, bf16=True)
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
    assert made["wall_clock_breakdown"] is True and made["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"train_batch_size": 8}', r"train_batch_size \(set train.batch_size\)"),
        ('{"zero_optimization": {"stage": 1}}', r"zero_optimization.stage \(set engine.stage\)"),
        ('{"bf16": {"enabled": true}, "optimizer": {}}', r"bf16 \(set train.dtype\).*optimizer"),
        ('{"steps_per_print": 5}', r"steps_per_print \(the run sets it\)"),
        ('{"zero_optimization": null}', "zero_optimization is not a JSON object"),
        ("{", "cannot be read"),
        ("[]", "is not a JSON object"),
    ],
)
def test_a_deepspeed_json_that_says_what_the_run_says_is_refused(tmp_path, text, named):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named) as caught:
        deepspeed_config(DeepSpeed(stage=1, config=str(path)), clip=1.0, bf16=False)
    assert str(path) in str(caught.value)
