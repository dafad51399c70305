"""The one table of rules, and the check of the settings that name them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator

from posttrain_dist.diagnosis import (
    DiagnoseConfig,
    rules_channels,
    rules_heldout,
    rules_loss,
    rules_preferences,
    rules_trend,
)
from posttrain_dist.diagnosis.alarms import Alarm
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.history import EVALUATIONS, History
from posttrain_dist.errors import ConfigError, short

# What a rule finds in the newest row; a pure function.
Rule = Callable[[History, DiagnoseConfig, ModelFacts], Iterator[Alarm]]

RULES: dict[str, Rule] = {
    "initial_loss": rules_loss.initial_loss,
    "not_finite": rules_loss.not_finite,
    "divergence": rules_loss.divergence,
    "rising_loss": rules_trend.rising_loss,
    "spike": rules_loss.spike,
    "stall": rules_trend.stall,
    "low_loss": rules_loss.low_loss,
    "overfitting": rules_heldout.overfitting,
    "channel_overfitting": rules_heldout.channel_overfitting,
    "starved_channel": rules_channels.starved_channel,
    "dominating_channel": rules_channels.dominating_channel,
    "special_tokens": rules_channels.special_tokens,
    "falling_chosen": rules_preferences.falling_chosen,
}
MAX_WINDOW = 1_000_000  # rows
MAX_LOSS = 100  # nats per token
MAX_OVERFIT_EVALS = EVALUATIONS - 4  # evaluations before them are needed too


def diagnose_problems(config: DiagnoseConfig) -> list[ConfigError]:
    """What is wrong with the group `diagnose`: unknown rules, numbers out of range."""
    found: list[ConfigError] = []

    def refuse(key: str, what: str, fix: str) -> None:
        found.append(ConfigError(what, where=f"diagnose.{key}", fix=fix))

    for key in ("off", "early_stop"):
        for name in getattr(config, key):
            if name not in RULES:
                near = difflib.get_close_matches(name, RULES, 1)
                fix = f"did you mean {near[0]}?" if near else f"the rules are {', '.join(RULES)}"
                refuse(key, f"has no rule {name!r}", fix)
    for name in sorted(set(config.off) & set(config.early_stop) & set(RULES)):
        what = f"names {name}, which diagnose.off leaves out"
        refuse("early_stop", what, "take it from one of the two lists")
    if not 10 <= config.window <= MAX_WINDOW:
        what = f"is {short(config.window)}, must be 10 to {MAX_WINDOW:,}"
        refuse("window", what, "the default is 30")
    if not 1 <= config.overfit_evals <= MAX_OVERFIT_EVALS:
        what = f"is {short(config.overfit_evals)}, must be 1 to {MAX_OVERFIT_EVALS}"
        refuse("overfit_evals", what, "the default is 3")
    if not 0 <= config.low_loss <= MAX_LOSS:
        what = f"is {short(config.low_loss)}, must be in [0, {MAX_LOSS}]"
        refuse("low_loss", what, "the default is 0.2")
    most = rules_channels.DOMINATING_SHARE
    if not 0 < config.starved_share < most:
        what = f"is {short(config.starved_share)}, must be above 0 and below {most:g}"
        refuse("starved_share", what, "the default is 0.01")
    return found
