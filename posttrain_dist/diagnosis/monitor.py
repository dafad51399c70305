"""Follows a run row by row: evaluates the rules, raises alarms, says when a run ends early.

metrics.jsonl row -> History (bounded) -> every rule -> Alarm, once per episode
docs/diagnosis.md describes each rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.diagnosis.alarms import Alarm, AlarmLog, Level, alarm_metrics
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.history import History, Row
from posttrain_dist.diagnosis.rule_table import RULES
from posttrain_dist.files import read_rows
from posttrain_dist.flow import StepInfo

QUIET_ROWS = 30  # rows without a finding after which it may be raised again
MAX_SUBJECTS = 4  # named by one alarm


class Diagnosis:
    """Evaluates every rule after every row; an alarm is raised once per episode.

    An episode of (rule, subject) ends after QUIET_ROWS rows without the finding. The state is
    a function of the rows alone, so a resumed run rebuilds it from metrics.jsonl.
    """

    def __init__(self, config: DiagnoseConfig, facts: ModelFacts) -> None:
        self.config, self.facts = config, facts
        self.history = History(window=config.window, mixture_starts=sorted(facts.target_shares))
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
        raised = [alarm for name in list(self._rules) for alarm in self._evaluate(name)]
        for alarm in raised:
            if alarm.rule in self.config.early_stop and alarm.level is not Level.info:
                self._stop = self._stop or alarm
        return raised

    def resume(self, rows: Iterable[Row]) -> None:
        """Rebuild the state from the rows of a run that goes on; their alarms were raised then.

        They do not stop it either: who starts a stopped run again wants it to go on. Without any
        row, what the loss fell from is not known, and no rule uses it.
        """
        for row in rows:
            self.observe(row)
        self.history.from_first_step = self._num_observed > 0
        self._stop = None

    @property
    def stop(self) -> Alarm | None:
        """The first alarm above level info of a rule in `early_stop`, if there was one."""
        return self._stop

    def _evaluate(self, name: str) -> list[Alarm]:
        """The alarms of one rule that begin now, as one where they are about several subjects."""
        try:
            found = list(self._rules[name](self.history, self.config, self.facts))
        except Exception as error:  # the fault of a rule must not end the training
            del self._rules[name]
            what = f"rule {name} failed: {type(error).__name__}: {error}"
            fix = "please report it with this run's metrics.jsonl; training goes on"
            message = f"{what}; it is not evaluated again in this run"
            return [Alarm(name, self.history.last["step"], Level.info, message, fix)]
        return _merged([alarm for alarm in found if self._begins(alarm)])

    def _begins(self, alarm: Alarm) -> bool:
        key = (alarm.rule, alarm.subject)
        before = self._last_seen.get(key)
        self._last_seen[key] = self._num_observed
        return before is None or self._num_observed - before > QUIET_ROWS


def _merged(alarms: list[Alarm]) -> list[Alarm]:
    """Of several alarms the first, which names the subjects of the others too."""
    if len(alarms) < 2:
        return alarms
    names = [alarm.subject for alarm in alarms]
    if len(names) > MAX_SUBJECTS:
        names[MAX_SUBJECTS - 1 :] = [f"{len(names) - MAX_SUBJECTS + 1} more"]
        subject = ", ".join(names[:-1]) + f" and {names[-1]}"
    else:
        subject = ", ".join(names)
    others = f"{len(alarms) - 1} other{'s' if len(alarms) > 2 else ''} like it"
    message = f"{alarms[0].message}; {others}"
    return [dataclasses.replace(alarms[0], message=message, subject=subject)]


class Monitor:
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
