"""The rules that watch a run, and the object that asks them once a row.

metrics.jsonl row -> History (bounded) -> every rule -> Alarm, once an episode
docs/diagnosis.md describes each rule.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_dist.diagnosis import rules_loss, rules_parts
from posttrain_dist.diagnosis.alarms import (
    Alarm,
    AlarmLog,
    DiagnoseConfig,
    Level,
    ModelFacts,
    alarm_metrics,
)
from posttrain_dist.diagnosis.history import EVALUATIONS, History, Row
from posttrain_dist.errors import ConfigError
from posttrain_dist.files import read_rows
from posttrain_dist.flow import StepInfo

__all__ = [
    "RULES",
    "Alarm",
    "DiagnoseConfig",
    "Diagnosis",
    "Level",
    "ModelFacts",
    "Watch",
    "alarm_metrics",
    "diagnose",
    "diagnose_problems",
]


MOST_NAMES = 4  # subjects that one alarm names


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: `find` gives what it sees now; `means` says it in one line."""

    find: Callable[[History, DiagnoseConfig, ModelFacts], Iterator[Alarm]]
    means: str


RULES: dict[str, Rule] = {
    "initial_loss": Rule(
        rules_loss.initial_loss, "the model, its tokenizer, the template or the mask is wrong"
    ),
    "not_finite": Rule(rules_loss.not_finite, "the numbers overflowed; the weights are lost"),
    "rising_loss": Rule(
        rules_loss.rising_loss, "the learning rate is too high, or the code that trains is wrong"
    ),
    "spike": Rule(rules_loss.spike, "a broken row, or a step that was too large"),
    "stall": Rule(rules_loss.stall, "the run learns nothing"),
    "low_loss": Rule(rules_loss.low_loss, "the rows are learned by heart"),
    "overfitting": Rule(rules_parts.overfitting, "later steps make the model worse on new rows"),
    "channel_overfitting": Rule(
        rules_parts.channel_overfitting, "later steps make one channel worse on new rows"
    ),
    "starved_channel": Rule(rules_parts.starved_channel, "a channel is hardly learned"),
    "dominating_channel": Rule(
        rules_parts.dominating_channel, "one channel decides every update, the others do not count"
    ),
    "special_tokens": Rule(
        rules_parts.special_tokens, "turns, tool calls or think blocks will not be closed"
    ),
}


class Diagnosis:
    """Asks every rule after every row; an alarm is raised once an episode.

    An episode of (rule, subject) ends after `quiet_rows` rows without the finding. The state is
    a function of the rows alone, so a resumed run rebuilds it from metrics.jsonl.
    """

    def __init__(self, config: DiagnoseConfig, facts: ModelFacts) -> None:
        self.config, self.facts = config, facts
        self.history = History(window=config.window, mixture_starts=sorted(facts.asked_shares))
        self._rules = {name: rule for name, rule in RULES.items() if name not in config.off}
        self._num_observed = 0
        self._last_seen: dict[tuple[str, str], int] = {}  # finding -> number of its last row
        self._stop: Alarm | None = None

    def observe(self, row: Row) -> list[Alarm]:
        """Take in one row of metrics.jsonl, in order; the alarms that begin with it."""
        if not any(key != "step" for key in row):
            return []  # the step was not logged
        self.history.add(row)
        self._num_observed += 1
        raised = [alarm for name in list(self._rules) for alarm in self._ask(name)]
        for alarm in raised:
            if alarm.rule in self.config.early_stop and alarm.level is not Level.info:
                self._stop = self._stop or alarm
        return raised

    def resume(self, rows: Iterable[Row]) -> None:
        """Rebuild the state from the rows of a run that goes on; their alarms were raised then.

        They do not stop it either: who starts a stopped run again wants it to go on. Without any
        row, what the loss fell from is not known, and no rule asks for it.
        """
        for row in rows:
            self.observe(row)
        self.history.known = self._num_observed > 0
        self._stop = None

    @property
    def stop(self) -> Alarm | None:
        """The first alarm above level info of a rule in `early_stop`, if there was one."""
        return self._stop

    def _ask(self, name: str) -> list[Alarm]:
        """The alarms of one rule that begin now, as one where they are about several subjects."""
        try:
            found = list(self._rules[name].find(self.history, self.config, self.facts))
        except Exception as error:  # the fault of a rule must not end the training
            del self._rules[name]
            what = f"rule {name} failed: {type(error).__name__}: {error}"
            fix = "please report it with this run's metrics.jsonl; training is not concerned"
            message = f"{what}; it is not asked again in this run"
            return [Alarm(name, self.history.last["step"], Level.info, message, fix)]
        return _as_one([alarm for alarm in found if self._begins(alarm)])

    def _begins(self, alarm: Alarm) -> bool:
        key = (alarm.rule, alarm.subject)
        before = self._last_seen.get(key)
        self._last_seen[key] = self._num_observed
        return before is None or self._num_observed - before > self.config.quiet_rows


def _as_one(alarms: list[Alarm]) -> list[Alarm]:
    """Of several alarms the first, which names the subjects of the others too."""
    if len(alarms) < 2:
        return alarms
    names = [alarm.subject for alarm in alarms]
    if len(names) > MOST_NAMES:
        names[MOST_NAMES - 1 :] = [f"{len(names) - MOST_NAMES + 1} more"]
        subject = ", ".join(names[:-1]) + f" and {names[-1]}"
    else:
        subject = ", ".join(names)
    others = f"{len(alarms) - 1} other{'s' if len(alarms) > 2 else ''} like it"
    message = f"{alarms[0].message}; {others}"
    return [dataclasses.replace(alarms[0], message=message, subject=subject)]


class Watch:
    """Diagnosis and its log on rank 0 of a run that begins, or goes on, at `start_step`."""

    def __init__(
        self, config: DiagnoseConfig, facts: ModelFacts, run_folder: Path, start_step: int
    ) -> None:
        self._diagnosis = Diagnosis(config, facts)
        self._log = AlarmLog(run_folder / "logs" / "alarms.jsonl", start_step)
        if start_step:
            rows = read_rows(run_folder / "metrics.jsonl")
            self._diagnosis.resume(row for row in rows if row["step"] <= start_step)

    def observe(self, info: StepInfo) -> None:
        """Take in one step before it is written; its alarms become metrics `alarm/<rule>`."""
        raised = self._diagnosis.observe(info.row())
        self._log.write(raised)
        info.metrics.update(alarm_metrics(raised))

    @property
    def stop(self) -> Alarm | None:
        """The alarm that ends the run, if there was one."""
        return self._diagnosis.stop

    @property
    def best_step(self) -> int | None:
        """The step of the lowest held-out loss so far; None: nothing was evaluated."""
        best = self._diagnosis.history.best_of_run
        return best.step if best else None

    def close(self) -> None:
        """Close the log."""
        self._log.close()


def diagnose(
    rows: Iterable[dict[str, Any]],
    config: DiagnoseConfig | None = None,
    facts: ModelFacts | None = None,
) -> list[Alarm]:
    """Every alarm of a whole history."""
    diagnosis = Diagnosis(config or DiagnoseConfig(), facts or ModelFacts())
    return [alarm for row in rows for alarm in diagnosis.observe(row)]


def diagnose_problems(config: DiagnoseConfig) -> list[ConfigError]:
    """What is wrong with the group `diagnose`: unknown rules, numbers out of range."""
    found = []
    for key in ("off", "early_stop"):
        for name in getattr(config, key):
            if name not in RULES:
                near = difflib.get_close_matches(name, RULES, 1)
                fix = f"did you mean {near[0]}?" if near else f"the rules are {', '.join(RULES)}"
                found.append(ConfigError(f"has no rule {name!r}", where=f"diagnose.{key}", fix=fix))
    both = sorted(set(config.off) & set(config.early_stop) & set(RULES))
    for name in both:
        what = f"names {name}, which diagnose.off leaves out"
        fix = "take it from one of the two lists"
        found.append(ConfigError(what, where="diagnose.early_stop", fix=fix))
    whole = {"window": 10, "quiet_rows": 1, "overfit_evals": 1, "stall_rows": 1, "special_rows": 1}
    for key, least in whole.items():
        value = getattr(config, key)
        if value < least:
            what, fix = f"is {value}, must be at least {least}", f"set it to {least} or more"
            found.append(ConfigError(what, where=f"diagnose.{key}", fix=fix))
    if config.overfit_evals > EVALUATIONS - 4:
        what, fix = f"is {config.overfit_evals}, more than are kept", "set it to 12 or less"
        found.append(ConfigError(what, where="diagnose.overfit_evals", fix=fix))
    return found + _float_problems(config)


# Keys with a fraction of a whole, and keys that may be 0; the others are above 0.
SHARES = (
    "random_band",
    "overfit_rise",
    "starved_share",
    "dominating_share",
    "stall_fall",
    "stall_eval_fall",
    "special_fall",
)
FROM_ZERO = (
    "rise_sigmas",
    "low_loss",
    "overfit_least",
    "overfit_sigmas",
    "spike_sigmas",
    "special_loss",
)
BELOW = {  # key -> one that is larger
    "medium_low": "medium_high",
    "large_low": "large_high",
    "starved_share": "dominating_share",
}


def _float_problems(config: DiagnoseConfig) -> list[ConfigError]:
    """Floats out of range; NaN and infinity are, everywhere."""
    found = []

    def wrong(key: str, what: str, fix: str) -> None:
        where = f"diagnose.{key}"
        found.append(ConfigError(f"is {getattr(config, key):g}, {what}", where=where, fix=fix))

    for item in dataclasses.fields(config):
        key, value = item.name, getattr(config, item.name)
        if not isinstance(item.default, float):
            continue
        least, most = 1.0 if key == "asked_ratio" else 0.0, 1.0 if key in SHARES else math.inf
        low_enough = value <= most and math.isfinite(value)
        if low_enough and (value > least or (value == least and key in FROM_ZERO)):
            continue
        range_ = f"{least:g} or more" if key in FROM_ZERO else f"above {least:g}"
        range_ += f" and at most {most:g}" if key in SHARES else ""
        wrong(key, f"must be {range_}", f"the default is {item.default:g}")
    for key, larger in BELOW.items():
        high = getattr(config, larger)
        if getattr(config, key) >= high:
            wrong(key, f"not below diagnose.{larger}, {high:g}", "lower it, or raise the other")
    return found
