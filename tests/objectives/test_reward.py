"""Losses of reward models: against plain torch in float64, however a global batch is cut."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compared_answers import sample, unit
from posttrain_kernels import linear_cross_entropy, linear_logprob
from torch.nn.functional import logsigmoid

from posttrain_dist.config import RunConfig, complete
from posttrain_dist.data.packs.collate import collate, filler
from posttrain_dist.errors import ConfigError
from posttrain_dist.metrics.channels import eval_metrics, train_metrics
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.preference.reward import Reward, RewardCount, RewardLoss
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.ia3 import Ia3
from posttrain_dist.tuning.lora import Lora

CHANNELS = ["a", "b"]


def units(values, margin=0.0):
    """One unit each, channels in turn."""
    draw = np.random.default_rng(0)
    found, first = [], 0
    for each in values:
        found.append(unit(draw, first, each, margin=margin))
        first += len(found[-1])
    return found


def loss_of(objective, groups, rewards_N):
    """Total and table of some units, whose answers have the rewards given, in their order."""
    batch = collate([each for group in groups for each in group], own_rows=True)
    padded = torch.zeros(len(batch.labels_N), dtype=torch.float64)
    padded[: batch.num_targets] = 1
    index = padded.cumsum(0).long().clamp(max=batch.num_targets) - 1
    head = SimpleNamespace(reward=lambda hidden: rewards_N[index], num_channels=2)
    result = objective.loss(padded, head, batch, objective.count(batch))
    return result, objective.count(batch)


@pytest.mark.parametrize("center", [0.0, 0.1])
def test_pairs_and_rankings_are_those_of_bradley_and_terry(center):
    groups = units([(1.0, 0.0), (2.0, 0.0, 1.0, 3.0), (0.0, 1.0)], margin=0.3)
    rewards = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = rewards.clone().requires_grad_()
    result, count = loss_of(Reward(center=center), groups, mine)
    result.total.backward()

    # The reference: every ranking is a mean over its pairs, and the loss a mean over prompts.
    own, start, total = rewards.clone().requires_grad_(), 0, 0.0
    for group in groups:
        values = [each.extra["value_S"] for each in group[1:]]
        r, start = own[start : start + len(values)], start + len(values)
        pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if values[i] > values[j]]
        for i, j in pairs:
            margin = 0.3 if values[i] == max(values) else 0.0
            one = -logsigmoid(r[i] - r[j] - margin) + center * (r[i] + r[j]) ** 2
            total = total + one / len(pairs)
    (total / len(groups)).backward()
    assert count == pytest.approx(RewardCount(3, 8))
    assert result.total.item() == pytest.approx(total.item() / 3, rel=1e-7)  # margins in float32
    torch.testing.assert_close(mine.grad, own.grad, rtol=1e-6, atol=1e-9)


def test_regression_is_the_mean_square_over_answers():
    groups = units([(0.5,), (2.0, -1.0, 4.0)])
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    objective = Reward(loss_type=RewardLoss.regression)
    result, count = loss_of(objective, groups, rewards)
    assert objective.rows == "scores" and Reward().rows == "pairs"
    assert count.answers == 4
    assert result.total.item() == pytest.approx((0.25 + 1 + 9 + 1) / 4)
    metrics = train_metrics(result.channels_CK, CHANNELS, objective)
    # Of the second prompt's three pairs, (2, -1) is wrong, (4, -1) and (4, 2) are right.
    assert metrics["reward/accuracy"] == pytest.approx(2 / 3)


def test_ties_are_no_comparison_and_nothing_is_nan():
    result, count = loss_of(Reward(), units([(1.0, 1.0)]), torch.randn(2, dtype=torch.float64))
    assert count == RewardCount(0, 2) and result.total.item() == 0
    empty = filler(Reward())
    assert Reward().count(empty) == RewardCount(0, 0)


def test_metrics_of_each_channel_and_the_calibration_error():
    groups = units([(1.0, 0.0)] * 4)
    apart = [2.0, -1.0, 2.0, 0.5]  # margins; channels: units start at 0, 3, 6, 9
    rewards = torch.tensor([r for m in apart for r in (m, 0.0)], dtype=torch.float64)
    result, _ = loss_of(Reward(), groups, rewards)
    metrics = eval_metrics(result.channels_CK, CHANNELS, Reward())
    assert metrics["eval_reward/accuracy"] == pytest.approx(3 / 4)
    assert metrics["eval_reward_channel_accuracy/b"] == pytest.approx(1 / 2)
    assert metrics["eval_reward_channel_margin/a"] == pytest.approx(2.0)
    assert metrics["eval_reward/chosen_reward"] == pytest.approx(sum(apart) / 4)
    # Three bins: 0.88 twice, both right; 0.73 once, wrong; 0.62 once, right.
    p = [1 / (1 + np.exp(-abs(m))) for m in apart]
    error = (2 * (1 - p[0]) + p[1] + (1 - p[3])) / 4
    assert metrics["eval_reward/calibration_error"] == pytest.approx(error, rel=1e-6)
    assert not any("confidence" in key or "bin" in key for key in metrics)


@pytest.fixture(scope="module")
def policy(tiny_llama):
    model = load_model(
        ModelConfig(path=str(tiny_llama)),
        tiny_llama,
        dtype=torch.float32,
        seed=0,
        materialise=nullcontext(),
        attach=Full().attach,
        scalar=True,
    )
    return Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 2)


def gradients_of(policy, objective, packs):
    """Total, metrics and gradients of one global batch, cut into packs."""
    policy.zero_grad()
    batches = [collate([e for group in pack for e in group], own_rows=True) for pack in packs]
    counts = [objective.count(batch) for batch in batches]
    denominators = counts[0]._make(map(sum, zip(*counts, strict=True)))
    total, table = 0.0, 0.0
    for batch in batches:
        result = policy(batch, objective, denominators)
        result.total.backward()
        total, table = total + result.total.item(), table + result.channels_CK
    found = {name: p.grad.clone() for name, p in policy.named_parameters()}
    return total, train_metrics(table, CHANNELS, objective), found


@pytest.mark.parametrize("loss_type", list(RewardLoss))
def test_the_cut_of_a_global_batch_changes_neither_loss_nor_gradient(policy, loss_type):
    center = 0.01 if loss_type is RewardLoss.bradley_terry else 0.0
    objective = Reward(loss_type=loss_type, center=center)
    groups = units([(1.0, 0.0), (2.0, 1.0, 0.0), (3.0, 1.0), (0.0, 2.0, 1.0, 5.0)])
    cuts = [[groups], [groups[:1], groups[1:]], [[group] for group in groups]]
    (total, metrics, whole), *others = [gradients_of(policy, objective, cut) for cut in cuts]
    for other_total, other_metrics, found in others:
        assert other_total == pytest.approx(total, rel=1e-6)
        assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        for name, gradient in found.items():
            scale = float(whole[name].norm())
            assert float((gradient - whole[name]).norm()) <= 1e-5 * scale + 1e-9, name


def test_a_shared_prompt_gives_the_rewards_of_answers_alone(policy):
    group = units([(3.0, 1.0, 2.0)])[0]
    batch = collate(group, own_rows=True)
    together = policy.head.reward(policy.hidden(batch))[:3]
    alone = []
    for answer in group[1:]:
        ids = [*group[0].input_ids_L, *answer.input_ids_L]
        one = collate([sample(ids, 0, None)], own_rows=True)
        one.supervised_N.fill_(len(ids) - 1)
        alone.append(policy.head.reward(policy.hidden(one))[0])
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-6)
    assert policy.check_head(batch) < 1e-5


def test_the_head_is_trained_beside_lora_and_other_tunings_are_refused():
    config = complete(RunConfig(objective=Reward(), tuning=Lora(modules_to_save=["norm"])))
    assert config.tuning.modules_to_save == ["norm", "score"]
    assert complete(config) == config
    with pytest.raises(ConfigError, match="new head of the reward model"):
        complete(RunConfig(objective=Reward(), tuning=Ia3()))
    with pytest.raises(ConfigError, match=r"objective\.center"):
        complete(RunConfig(objective=Reward(loss_type=RewardLoss.regression, center=0.1)))
