"""The search behind the loop of sweeps, on a backend whose trials are a closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from posttrain_launch.failures import STOPPED
from posttrain_launch.sweep import loop
from posttrain_launch.sweep.folder import State, Sweep, Trial, read_trials, write_sweep
from posttrain_launch.sweep.results import read_results
from posttrain_launch.sweep.search import study
from posttrain_launch.sweep.search.journal import open_study

WORDS = ["tuning.rank=4,8,16,32", "optimizer.lr=tag(log, interval(1e-5,1e-1))"]
STEPS = 20


def loss_of(trial: Trial) -> float:
    """Best, and 1, at rank 16 and lr 1e-3."""
    values = dict(word.split("=") for word in trial.overrides)
    lr, rank = float(values["optimizer.lr"]), float(values["tuning.rank"])
    return 1 + math.log10(lr / 1e-3) ** 2 + math.log2(rank / 16) ** 2 / 4


class ClosedForm:
    """Trials that take one step at each look, and mind STOP as a training does."""

    slots, waits, retries = 2, True, 0

    def __init__(self) -> None:
        self.trials: dict[int, Trial] = {}
        self.steps: dict[int, int] = {}

    def start(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            (trial.folder / "logs").mkdir(exist_ok=True)
            self.trials[trial.number], self.steps[trial.number] = trial, 0

    def running(self) -> set[int]:
        for trial in list(self.trials.values()):
            self._step(trial)
        return set(self.trials)

    def _step(self, trial: Trial) -> None:
        self.steps[trial.number] += 1
        step = self.steps[trial.number]
        row = {"step": step, "eval/loss": loss_of(trial) + 1 / step, "time_s": float(step)}
        with (trial.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if step == STEPS:
            (trial.folder / "FINISHED").touch()
        elif (trial.folder / "STOP").exists():
            (trial.folder / "logs" / "outcome.json").write_text('{"outcome": "stopped"}')
        else:
            return
        del self.trials[trial.number]

    def code(self, number: int) -> int | None:
        return 0 if self.steps[number] == STEPS else STOPPED

    def stop(self) -> None:
        raise AssertionError("nothing stops this sweep")

    def close(self) -> None:
        pass


def swept(folder: Path, **options) -> tuple[Sweep, dict[int, State]]:
    planned = study.plan(options, WORDS)
    sweep = Sweep(
        folder=folder, name="s", command="", created="", cwd="", search=planned,
        metric=planned["metric"], direction=planned["direction"],
    )  # fmt: skip
    write_sweep(sweep)

    def freeze(trial: Trial) -> None:
        trial.folder.mkdir()
        (trial.folder / "config.yaml").touch()

    lines: list[str] = []
    driven = loop.Loop(sweep, ClosedForm(), study.restore(sweep), freeze, lines.append)
    return sweep, driven.run()


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "POLL_S", 0)


@pytest.mark.slow
def test_tpe_ends_nearer_to_the_optimum_than_random(tmp_path):
    best = {}
    for sampler in ("tpe", "random"):
        sweep, states = swept(tmp_path / sampler, sampler=sampler, n_trials=30, seed=3)
        assert list(states.values()) == [State.done] * 30
        best[sampler] = read_results(sweep)["trials"][0]["value"] - 1 - 1 / STEPS
    assert best["tpe"] < 0.5 * best["random"]


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_a_trial_that_is_given_up_takes_one_step_more(pruner, tmp_path):
    sweep, states = swept(tmp_path / "s", pruner=pruner, n_trials=20, startup_trials=3)
    pruned = [trial for trial in read_trials(sweep.folder) if states[trial.number] is State.pruned]
    assert 5 < len(pruned) < 20
    known = open_study(sweep.folder, "minimize").trials
    for trial in pruned:
        assert (trial.folder / "STOP").read_text() == "pruned\n"
        decided = int((trial.folder / "PRUNED").read_text().split()[1])
        rows = (trial.folder / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == decided + 1 < STEPS
        frozen = known[trial.extra["optuna"]]
        assert (frozen.state.name, frozen.user_attrs["pruned_at"]) == ("PRUNED", decided)
    # What was given up is worse than what was not.
    done = [loss_of(t) for t in read_trials(sweep.folder) if states[t.number] is State.done]
    assert min(done) < min(map(loss_of, pruned))
    steps = sum(
        len((sweep.folder / f"trial-{n:03d}" / "metrics.jsonl").read_text().splitlines())
        for n in range(20)
    )
    assert steps < 0.7 * 20 * STEPS
