"""The rule over preferred answers: what must fire, what must not; and the others under DPO."""

from __future__ import annotations

import math
import random
import runpy
from pathlib import Path
from types import SimpleNamespace

import torch

from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.history import preferred_value
from posttrain_dist.diagnosis.monitor import diagnose
from posttrain_dist.metrics.channels import train_metrics
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.objectives.preference.kto import Kto
from posttrain_dist.objectives.preference.orpo import Orpo
from posttrain_dist.objectives.preference.simpo import Simpo

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_histories.py"))))
training, only, falling, flat = made.training, made.only, made.falling, made.flat
DPO = ModelFacts(token_loss=False, vocab_size=32000)
TOKENS = 50


def preference(change, count: int = 120, seed: int = 1, **more):
    """A DPO run from ln 2 on, whose chosen answers become `change` nats a token more likely."""
    draw = random.Random(seed)
    return training(
        falling(math.log(2), 0.2),
        count,
        dpo__chosen_tokens=lambda _: TOKENS + draw.gauss(0, 10),
        dpo__chosen_logprob=lambda s: TOKENS * (-1.2 + change(s)) + draw.gauss(0, 15),
        dpo__chosen_logratio=lambda s: TOKENS * change(s) + draw.gauss(0, 0.5),
        **more,
    )


def test_chosen_answers_that_fall_for_a_whole_window_are_an_alarm() -> None:
    (alarm,) = only("falling_chosen", diagnose(preference(lambda s: -0.004 * s), facts=DPO))
    # 0.1 below the start from step 28 on, and then for 27 of 30 rows.
    assert 50 <= alarm.step <= 62 and alarm.level.name == "warning"
    assert "nats per token less likely than at the start" in alarm.message
    assert "objective.sft_weight=1.0" in alarm.fix


def test_kto_and_losses_without_a_reference_are_watched_too() -> None:
    for objective, kind in (("kto", "desirable"), ("simpo", "chosen")):
        more = {
            f"{objective}__{kind}_tokens": flat(TOKENS),
            f"{objective}__{kind}_logprob": lambda s: TOKENS * (-1.0 - 0.004 * s),
        }
        rows = training(falling(math.log(2), 0.2), 120, **more)
        assert only("falling_chosen", diagnose(rows, facts=DPO)), objective


def test_it_reads_what_the_objectives_log() -> None:
    for objective, watched in (
        (Dpo(), "chosen_logratio"),
        (Kto(), "desirable_logratio"),
        (Simpo(), "chosen_logprob"),
        (Orpo(), "chosen_logprob"),
    ):
        sums = [6.0 if column.name == watched else 2.0 for column in objective.columns]
        row = train_metrics(torch.tensor([sums], dtype=torch.float64), ["all"], objective)
        assert preferred_value(row) == 3.0, objective.name
    assert preferred_value({"train/loss": 1.0, "eval_dpo/chosen_tokens": 2.0}) is None


def test_what_does_not_fall_is_none() -> None:
    for change in (
        flat(0.0),
        lambda s: 0.002 * s,  # they become more likely
        lambda s: -0.09 * min(1, s / 20),  # a little less, as of most runs
        lambda s: -0.4 * math.exp(-(((s - 60) / 8) ** 2)),  # for a while
    ):
        assert diagnose(preference(change), facts=DPO) == []


def test_longer_and_harder_rows_are_no_fall() -> None:
    """log p falls with the rows, and that against the reference stays."""
    rows = preference(flat(0.0))
    for row in rows:
        row["dpo/chosen_logprob"] -= 0.02 * TOKENS * row["step"]
    assert diagnose(rows, facts=DPO) == []


def test_rules_of_token_losses_leave_a_preference_alone() -> None:
    """From ln 2 to almost nothing: that is neither an untrained nor a memorised model."""
    assert diagnose(training(falling(math.log(2), 0.02), 200, noise=0.02), facts=DPO) == []
    # Of a token loss it is.
    facts = ModelFacts(vocab_size=32000)
    assert only("low_loss", diagnose(training(falling(0.69, 0.02), 200, noise=0.02), facts=facts))


def test_a_preference_that_does_not_move_is_told_no_rate_of_sft() -> None:
    (alarm,) = diagnose(training(flat(math.log(2)), 200, noise=0.001), facts=DPO)
    assert alarm.rule == "stall" and "raise optimizer.lr" in alarm.fix
    assert "1e-5" not in alarm.fix
