"""What a preference objective refuses, by the key that is to be changed; and its learning rate."""

from __future__ import annotations

import pytest

from posttrain_dist.config import SLOTS, RunConfig, complete
from posttrain_dist.config.advice import learning_rate_line
from posttrain_dist.engine import AdamW
from posttrain_dist.errors import ConfigError
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.objectives.preference.kto import Kto
from posttrain_dist.objectives.preference.loss_types import Divergence, LossType
from posttrain_dist.objectives.preference.orpo import Orpo
from posttrain_dist.objectives.preference.simpo import Simpo
from posttrain_dist.objectives.reference_choice import Referenced
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.lora import Lora

REFUSED = {
    "beta_0": (Dpo(beta=0.0), r"objective\.beta: is 0\.0, must be above 0.*nothing is trained"),
    "beta_nan": (Dpo(beta=float("nan")), r"objective\.beta: is nan"),
    "kto_beta": (Kto(beta=-1.0), r"objective\.beta: is -1"),
    "orpo_beta": (Orpo(beta=0.0), r"objective\.beta: is 0"),
    "simpo_beta": (Simpo(beta=0.0), r"objective\.beta: is 0"),
    "gamma": (Simpo(gamma=-0.5), r"objective\.gamma: is -0\.5, must be at least 0"),
    "kto_weight": (Kto(desirable_weight=0.0), r"objective\.desirable_weight: is 0"),
    "sft_weight": (Dpo(sft_weight=-1.0), r"objective\.sft_weight: is -1"),
    "half_wrong": (
        Dpo(loss_type=LossType.robust, label_smoothing=0.5),
        r"objective\.label_smoothing: is 0\.5, must be in \[0, 0\.5\)",
    ),
    "no_place": (
        Dpo(loss_type=LossType.ipo, label_smoothing=0.1),
        r"label_smoothing: is 0\.1, and ipo knows no wrong labels",
    ),
    "exo": (Dpo(loss_type=LossType.exo_pair), r"is 0, and exo_pair takes the logarithm of it"),
    "divergence": (
        Dpo(loss_type=LossType.sppo_hard, f_divergence=Divergence.js),
        r"f_divergence: is js, and sppo_hard is made for reverse_kl alone",
    ),
    "alpha": (Dpo(f_divergence=Divergence.alpha, alpha=1.0), r"objective\.alpha: is 1\.0"),
    "unknown": (Dpo(losses={"sigmoyd": 1.0}), r"objective\.losses: has no loss sigmoyd"),
    "weight_0": (Dpo(losses={"sigmoid": 0.0}), r"objective\.losses: .*must be above 0"),
    "both": (
        Dpo(loss_type=LossType.ipo, losses={"sigmoid": 1.0}),
        r"objective\.losses: is set together with objective\.loss_type=ipo",
    ),
    "one_of_a_sum": (
        Dpo(losses={"sigmoid": 1.0, "hinge": 0.5}, label_smoothing=0.1),
        r"label_smoothing: is 0\.1, and hinge knows no wrong labels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_combination_that_means_nothing_is_refused(name):
    objective, message = REFUSED[name]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        complete(RunConfig(objective=objective))


def test_dropout_of_an_adapter_is_refused():
    with pytest.raises(ConfigError, match=r"tuning\.dropout: is 0\.1, and objective=dpo"):
        complete(RunConfig(objective=Dpo(), tuning=Lora(dropout=0.1)))
    complete(RunConfig(tuning=Lora(dropout=0.1)))


def test_a_preference_is_trained_a_tenth_as_fast_as_sft():
    for tuning in (Full(), Lora()):
        config = complete(RunConfig(objective=Dpo(), tuning=tuning))
        assert config.optimizer.lr == pytest.approx(tuning.default_lr / 10)
        assert "under dpo" in learning_rate_line(config)
        assert complete(RunConfig(tuning=tuning)).optimizer.lr == tuning.default_lr
    named = complete(RunConfig(objective=Dpo(), optimizer=AdamW(lr=1e-4)))
    assert named.optimizer.lr == 1e-4 and "as set" in learning_rate_line(named)


def test_a_sum_of_losses_survives_freezing():
    objective = Dpo(losses={"sigmoid": 1.0, "ipo": 0.5}, f_divergence=Divergence.reverse_kl)
    config = complete(RunConfig(objective=objective))
    again = RunConfig.from_yaml(config.to_yaml()).objective
    assert again == objective
    assert again.weights == {LossType.sigmoid: 1.0, LossType.ipo: 0.5}


def test_all_that_compare_log_probabilities_switch_dropout_off():
    kinds = [SLOTS["objective"][name] for name in ("dpo", "orpo", "simpo", "kto")]
    assert all(kind.no_dropout and kind().lr_factor == 0.1 for kind in kinds)
    assert [issubclass(kind, Referenced) for kind in kinds] == [True, False, False, True]
