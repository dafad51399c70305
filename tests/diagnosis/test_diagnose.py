"""The diagnosis as a whole: no false alarms, resuming, early stop, config and docs."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain_dist.diagnosis import (
    DiagnoseConfig,
    monitor,
    rules_channels,
    rules_heldout,
    rules_loss,
    rules_trend,
)
from posttrain_dist.diagnosis.alarms import Alarm, AlarmLog, Level, alarm_metrics, read_alarms
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.history import History
from posttrain_dist.diagnosis.monitor import Diagnosis, Monitor, diagnose
from posttrain_dist.diagnosis.rule_table import RULES, diagnose_problems
from posttrain_dist.files import read_rows
from posttrain_dist.flow import StepInfo

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_histories.py"))))
training, with_evals, only = made.training, made.with_evals, made.only
falling, flat, bowl = made.falling, made.flat, made.bowl

DOCS = Path(__file__).resolve().parents[2] / "docs" / "diagnosis.md"
SMALL = ModelFacts(parameters=2_400_000, vocab_size=2048)
SEVEN = ModelFacts(parameters=7_000_000_000, vocab_size=32_000)


# ------------------------------------------------------------------------------ no false alarms


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_nothing(seed: int) -> None:
    draw = random.Random(seed)
    names, rows = ("a", "b", "c", "rare"), []
    ends = {name: draw.uniform(0.3, 2.0) for name in names}
    for step in range(601):
        true = {name: falling(ends[name] + 2, ends[name], 80)(step) for name in names}
        row: dict[str, float] = {"step": step}
        if step:
            weights = {n: draw.lognormvariate(0, 0.7) for n in names}
            weights["rare"] = 0.15 * (draw.random() < 0.5)
            total = sum(weights.values())
            row |= {f"channel_share/{n}": w / total for n, w in weights.items() if w}
            row |= {
                f"channel_loss/{n}": true[n] * draw.lognormvariate(0, 0.2)
                for n, w in weights.items()
                if w
            }
            row["train/loss"] = sum(
                row[f"channel_loss/{n}"] * w / total for n, w in weights.items() if w
            )
            row["train/grad_norm"] = draw.lognormvariate(0, 0.5)
            row["train/lr"] = 1e-4 * min(1, step / 30)
            row["special_token_loss/end"] = falling(4, 0.05)(step) * draw.lognormvariate(0, 0.5)
        if step % 50 == 0:
            jitter = {n: true[n] * (1 + 0.01 * draw.gauss(0, 1)) for n in names}
            row["eval/loss"] = sum(jitter.values()) / 4
            row |= {f"eval_channel_loss/{n}": value for n, value in jitter.items()}
        rows.append(row)
    assert diagnose(rows, facts=SMALL) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_long_noisy_plateau_does_not_rise_or_spike(seed: int) -> None:
    rows = training(falling(3.0, 2.0), 1500, noise=0.2, seed=seed)
    assert diagnose(rows) == []


def test_rows_of_any_kind_are_taken() -> None:
    rows = [
        {"step": 0},
        {"step": 0, "eval/loss": 2.0},
        {"step": 1, "time_s": 3.0, "train/lr": "fast", "note": None},
        {"step": 2, "train/loss": None, "channel_loss/a/b": 1.0, "channel_share/": 2},
        {"step": 3, "train/loss": 2, "alarm/spike": 1.0},
        {"step": 4, "eval/loss": True},
    ]
    assert diagnose(rows * 10, facts=SEVEN) == []
    assert diagnose([]) == []


# ------------------------------------------------------------------------------ the object


def troubled() -> list[dict]:
    """Overfitting at 300, a spike at 120, and starvation from the start."""
    more = {"channel_share__a": flat(0.995), "channel_share__b": flat(0.005)}
    rows = training(falling(2.0, 0.5, 150), 400, noise=0.05, **more)
    rows[119]["train/loss"] = 8.0
    return with_evals(rows, 50, eval__loss=bowl(150, 1.5, 0.002))


def test_a_resumed_run_raises_what_an_unbroken_one_does() -> None:
    rows = troubled()
    config = DiagnoseConfig(early_stop=["starved_channel"])
    whole = diagnose(rows, config)
    assert {alarm.rule for alarm in whole} == {
        "spike",
        "overfitting",
        "starved_channel",
        "dominating_channel",
    }
    for cut in (1, 40, 121, 250, 301):
        resumed = Diagnosis(config, ModelFacts())
        # As read back from the file, where alarms stand beside the metrics.
        before = [json.loads(json.dumps(row | {"alarm/spike": 1.0})) for row in rows[:cut]]
        resumed.resume(before)
        assert resumed.stop is None
        rest = [alarm for row in rows[cut:] for alarm in resumed.observe(row)]
        assert rest == [alarm for alarm in whole if alarm.step >= rows[cut]["step"]]


def test_early_stop_holds_the_first_alarm_of_the_named_rules() -> None:
    diagnosis = Diagnosis(DiagnoseConfig(early_stop=["overfitting", "spike"]), ModelFacts())
    stops = {}
    for row in troubled():
        diagnosis.observe(row)
        stops[row["step"]] = diagnosis.stop and (diagnosis.stop.rule, diagnosis.stop.step)
    assert stops[119] is None
    assert stops[120] == stops[400] == ("spike", 120)
    quiet = Diagnosis(DiagnoseConfig(early_stop=["low_loss"]), ModelFacts())
    solved = training(falling(2.0, 0.05, 15), 150)
    raised = [
        alarm
        for row in with_evals(solved, 50, eval__loss=falling(2, 0.06, 15))
        for alarm in quiet.observe(row)
    ]
    assert [alarm.level for alarm in raised] == [Level.info]
    assert quiet.stop is None  # what is only worth a look ends nothing


def test_rules_can_be_left_out() -> None:
    config = DiagnoseConfig(off=["spike", "starved_channel"])
    assert {a.rule for a in diagnose(troubled(), config)} == {"overfitting", "dominating_channel"}


def test_a_rule_that_fails_is_left_out_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []

    def broken(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
        evaluated.append(history.last["step"])
        yield Alarm("stall", 1, Level.error, "half of what it finds", "none")
        yield Alarm("stall", 1 // (40 - history.last["step"]), Level.error, "the rest", "none")

    rows = troubled()
    usual = diagnose(rows)
    monkeypatch.setitem(RULES, "stall", broken)
    monkeypatch.setattr(monitor, "QUIET_ROWS", 1000)
    config = DiagnoseConfig(early_stop=["stall"])
    (first, failed) = only("stall", diagnose(rows, config))
    assert (first.step, failed.step, failed.level) == (1, 40, Level.info)
    assert failed.message.startswith("rule stall failed: ZeroDivisionError: ")
    assert "report it" in failed.fix
    assert evaluated == list(range(41))
    assert [a for a in diagnose(rows) if a.rule != "stall"] == usual
    resumed = Diagnosis(config, ModelFacts())
    resumed.resume(rows[:50])  # the alarm was raised then
    assert only("stall", [alarm for row in rows[50:] for alarm in resumed.observe(row)]) == []
    assert resumed.stop is None


def test_memory_is_bounded() -> None:
    down = falling(2.0, 1.0)

    def size(count: int) -> int:
        diagnosis = Diagnosis(DiagnoseConfig(), ModelFacts())
        rows = training(down, count, channel_share__a=flat(0.4), channel_loss__a=down)
        for row in with_evals(rows, 20, eval__loss=down, eval_channel_loss__a=down):
            diagnosis.observe(row)
        history = diagnosis.history
        values = [getattr(history, f.name) for f in dataclasses.fields(history)]
        return sum(len(value) for value in values if hasattr(value, "__len__"))

    assert size(2000) == size(2600)  # 64 blocks of 30 rows are kept


def test_alarm_metrics_and_the_log(tmp_path: Path) -> None:
    alarms = diagnose(troubled())
    assert alarm_metrics([]) == {}
    assert alarm_metrics(only("spike", alarms)) == {"alarm/spike": 1.0}
    path = tmp_path / "logs" / "alarms.jsonl"
    log = AlarmLog(path, 0)
    assert path.read_text() == ""
    log.write([])
    for alarm in alarms:
        log.write([alarm])
    log.close()
    with path.open("a") as torn:
        torn.write('{"rule": "spi')
    rows = read_alarms(path)
    assert [(row["rule"], row["step"]) for row in rows] == [(a.rule, a.step) for a in alarms]
    assert rows[0].keys() == {"rule", "step", "level", "message", "fix", "subject"}
    assert rows[0]["level"] == "warning"
    AlarmLog(path, 120).close()  # a run resumed at step 120 will raise the later ones again
    assert [row["step"] for row in read_alarms(path)] == [a.step for a in alarms if a.step <= 120]
    assert max(a.step for a in alarms) > 120
    AlarmLog(path, 0).close()
    assert read_alarms(path) == []


def test_a_monitor_goes_on_where_the_run_does(tmp_path: Path) -> None:
    rows = troubled()
    config = DiagnoseConfig(early_stop=["overfitting"])

    def follow(start: int, rows: list[dict]) -> Monitor:
        followed = Monitor(config, ModelFacts(), tmp_path, start)
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            for row in rows:
                metrics = {key: value for key, value in row.items() if key != "step"}
                info = StepInfo(row["step"], metrics=metrics)
                followed.observe(info)
                stream.write(json.dumps(info.row()) + "\n")
        followed.close()
        return followed

    broken = follow(0, rows[:250])
    assert broken.stop is None
    assert broken.best_step == 150
    resumed = follow(200, rows[201:])  # rows 201 to 249 are made again
    assert resumed.stop is not None
    assert (resumed.stop.rule, resumed.stop.step) == ("overfitting", 300)
    assert resumed.best_step == 150
    logged = [(row["rule"], row["step"]) for row in read_alarms(tmp_path / "logs/alarms.jsonl")]
    assert logged == [(alarm.rule, alarm.step) for alarm in diagnose(rows)]
    marked = {
        (key, row["step"])
        for row in read_rows(tmp_path / "metrics.jsonl")
        for key in row
        if key.startswith("alarm/")
    }
    assert marked == {(f"alarm/{rule}", step) for rule, step in logged}


def test_alarm_line() -> None:
    alarm = Alarm("spike", 7, Level.warning, "it is high", "look", "maths")
    assert alarm.line() == "step 7: warning: spike (maths): it is high\n  fix: look"


# ------------------------------------------------------------------------------ config and docs


def test_config_problems_name_key_and_nearest_rule() -> None:
    assert diagnose_problems(DiagnoseConfig()) == []
    config = DiagnoseConfig(
        off=["stal", "spike"], early_stop=["spike", "xyz"], window=3, overfit_evals=20
    )
    texts = [str(problem) for problem in diagnose_problems(config)]
    assert len(texts) == 5
    assert texts[0] == "diagnose.off: has no rule 'stal'\n  fix: did you mean stall?"
    assert "diagnose.early_stop: has no rule 'xyz'" in texts[1]
    assert "initial_loss, not_finite" in texts[1]
    assert "names spike, which diagnose.off leaves out" in texts[2]
    assert "diagnose.window: is 3, must be 10 to 1,000,000" in texts[3]
    assert "diagnose.overfit_evals: is 20, must be 1 to 12" in texts[4]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"low_loss": -0.1}, "diagnose.low_loss: is -0.1, must be in [0, 100]"),
        ({"low_loss": math.inf}, "diagnose.low_loss: is inf, must be in [0, 100]"),
        ({"low_loss": math.nan}, "diagnose.low_loss: is nan, must be in [0, 100]"),
        ({"starved_share": 0.0}, "diagnose.starved_share: is 0.0, must be above 0 and below 0.9"),
        ({"starved_share": 0.9}, "diagnose.starved_share: is 0.9, must be above 0 and below 0.9"),
        ({"starved_share": math.nan}, "diagnose.starved_share: is nan, must be above 0"),
        ({"window": 9}, "diagnose.window: is 9, must be 10 to 1,000,000"),
        ({"overfit_evals": 0}, "diagnose.overfit_evals: is 0, must be 1 to 12"),
    ],
)
def test_numbers_out_of_range_are_refused(setting: dict[str, float], says: str) -> None:
    (problem,) = diagnose_problems(DiagnoseConfig(**setting))
    assert str(problem).startswith(says)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    ends = {"window": 10, "overfit_evals": 12, "low_loss": 0.0, "starved_share": 0.89}
    assert diagnose_problems(DiagnoseConfig(**ends)) == []
    assert diagnose_problems(DiagnoseConfig(overfit_evals=1)) == []


def test_docs_name_every_rule_and_default() -> None:
    text = DOCS.read_text()
    table = text[: text.index("## Keys")]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert rows == list(RULES)
    keys = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text[text.index("## Keys") :], re.M))
    defaults = DiagnoseConfig()
    assert keys == {
        f.name: str(getattr(defaults, f.name)) for f in dataclasses.fields(DiagnoseConfig)
    }
    for name in keys:  # each is explained where its rule is described
        assert f"`{name}`" in table or f"`diagnose.{name}=" in table, name


def test_docs_give_the_thresholds_of_the_rules() -> None:
    text = DOCS.read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", text, re.MULTILINE))
    medium, large = rules_loss.MEDIUM_EXPECTED, rules_loss.LARGE_EXPECTED
    figures = {
        "initial_loss": [
            f"{rules_loss.RANDOM_BAND:.0%} of ln V",
            f"{rules_loss.MEDIUM_MODEL / 1e9:g} to {rules_loss.LARGE_MODEL / 1e9:g} billion",
            f"outside {medium[0]:g} to {medium[1]:g}",
            f"outside {large[0]:g} to {large[1]:g}",
        ],
        "divergence": [
            f"above {rules_loss.FAR_OFF:g} times its bound",
            f"above {rules_loss.DIVERGED:g} times in two values",
            f"newest {rules_loss.RISEN_ROWS} rows",
            f"{rules_loss.DIVERGED:g} times the first {rules_loss.FIRST_FEW}",
        ],
        "rising_loss": [
            f"by {rules_trend.RISE:.0%} and by {rules_trend.RISE_SIGMAS:g} standard errors"
        ],
        "spike": [
            f"by {rules_loss.SPIKE_RISE:.0%} and by {rules_loss.SPIKE_SIGMAS:g} standard deviations"
        ],
        "stall": [
            f"{rules_trend.STALL_ROWS} rows after warm-up",
            f"first value by {rules_trend.STALL_EVAL_FALL:.0%}",
            f"training loss by {rules_trend.STALL_FALL:.0%}",
            f"{rules_trend.FALL_SIGMAS:g} standard errors below its first",
        ],
        "overfitting": [
            f"by {rules_heldout.OVERFIT_RISE:.0%}",
            f"by {rules_heldout.OVERFIT_NATS:g} nats",
            f"{rules_heldout.OVERFIT_SIGMAS:g} times the jitter",
        ],
        "starved_channel": [f"below its target divided by {rules_channels.TARGET_RATIO:g}"],
        "dominating_channel": [
            f"above {rules_channels.DOMINATING_SHARE:.0%}",
            f"above its target times {rules_channels.TARGET_RATIO:g}",
        ],
        "special_tokens": [
            f"after {rules_channels.SPECIAL_ROWS} rows",
            f"above {rules_channels.SPECIAL_LOSS:g}",
            f"by {rules_channels.SPECIAL_FALL:.0%}",
        ],
    }
    missing = [
        (rule, part) for rule, parts in figures.items() for part in parts if part not in rows[rule]
    ]
    assert missing == []
    assert f"only after {monitor.QUIET_ROWS} rows without the finding" in " ".join(text.split())
