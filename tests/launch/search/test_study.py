"""The search itself: proposals, what is taken in once, and a better optimum than chance's."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import optuna
import pytest
from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import TrialState
from posttrain_launch.sweep.folder import State, Sweep, Trial, trial_folder
from posttrain_launch.sweep.search import study
from posttrain_launch.sweep.search.methods import is_promoted
from posttrain_launch.sweep.search.options import OptunaSweeper
from posttrain_launch.sweep.search.space import read_space

from posttrain_dist.errors import PosttrainError

RANKS = "tuning.rank=4,8,16,32"
LR = "optimizer.lr=tag(log, interval(1e-5,1e-1))"


def search_of(folder: Path, words: list[str], **options) -> study.OptunaSearch:
    folder.mkdir(exist_ok=True)
    return study.OptunaSearch(folder, OptunaSweeper(**options), read_space(words))


def proposed(found: study.OptunaSearch, folder: Path, number: int, free: int = 1) -> list[Trial]:
    return [
        Trial(number + i, proposal.overrides, trial_folder(folder, number + i), proposal.extra)
        for i, proposal in enumerate(found.ask(free))
    ]


def value_of(overrides: tuple[str, ...]) -> float:
    """Best, and 0, at rank 16 and lr 1e-3."""
    values = dict(word.split("=") for word in overrides)
    lr, rank = float(values["optimizer.lr"]), float(values["tuning.rank"])
    return math.log10(lr / 1e-3) ** 2 + math.log2(rank / 16) ** 2 / 4


def searched(folder: Path, **options) -> list[Trial]:
    found = search_of(folder, [RANKS, LR], **options)
    trials: list[Trial] = []
    while not found.finished:
        [trial] = proposed(found, folder, len(trials))
        found.tell(trial, State.done, value_of(trial.overrides))
        trials.append(trial)
    return trials


def test_tpe_finds_what_random_does_not(tmp_path):
    means = {}
    for sampler in ("tpe", "random"):
        best = [
            min(
                value_of(trial.overrides)
                for trial in searched(
                    tmp_path / f"{sampler}{seed}", sampler=sampler, seed=seed, n_trials=30
                )
            )
            for seed in range(2)
        ]
        means[sampler] = sum(best) / len(best)
    assert means["tpe"] < 0.5 * means["random"]


def test_one_seed_gives_one_search_and_another_another(tmp_path):
    names = [("a", 1), ("b", 1), ("c", 2)]
    first, second, other = (
        [trial.overrides for trial in searched(tmp_path / name, seed=seed, n_trials=9)]
        for name, seed in names
    )
    assert first == second
    assert not set(first) & set(other)


def test_a_finite_space_is_searched_through_once(tmp_path):
    words = ["tuning.rank=4,8", "seed=range(1,4)", "tuning.dropout=range(0.0,0.15,step=0.1)"]
    found = search_of(tmp_path / "s", words, n_trials=50, startup_trials=2)
    trials: list[Trial] = []
    while not found.finished:
        trials += (new := proposed(found, tmp_path, len(trials), free=3))
        for trial in new:
            found.tell(trial, State.done, float(trial.number))
    every = itertools.product((4, 8), (1, 2, 3), ("0", "0.1"))
    wanted = {(f"tuning.rank={r}", f"seed={s}", f"tuning.dropout={d}") for r, s, d in every}
    assert len(trials) == 12
    assert {trial.overrides for trial in trials} == wanted


def test_no_more_than_n_jobs_at_a_time(tmp_path):
    found = search_of(tmp_path / "s", [RANKS, LR], n_jobs=2, n_trials=5)
    first = proposed(found, tmp_path, 0, free=9)
    assert len(first) == 2
    assert found.ask(9) == []
    found.tell(first[0], State.failed, None)
    assert len(found.ask(9)) == 1


def test_a_launcher_with_any_room_gets_a_few_at_a_time(tmp_path):
    found = search_of(tmp_path / "s", [RANKS, LR], n_trials=20)
    first = proposed(found, tmp_path, 0, free=1_000_000)
    assert len(first) == 4
    found.tell(first[0], State.done, 1.0)
    assert len(found.ask(1_000_000)) == 1


def states(folder: Path) -> list[tuple[TrialState, float | None]]:
    known = study.open_study(folder, "minimize").get_trials()
    return [(trial.state, trial.value) for trial in known]


def test_results_are_taken_in_once_and_a_failure_that_ended_well_later_too(tmp_path):
    folder = tmp_path / "s"
    found = search_of(folder, [RANKS, LR], n_trials=4, pruner="median")
    trials = proposed(found, folder, 0, free=4)
    for _ in range(2):
        found.tell(trials[0], State.done, 0.5)
        found.tell(trials[1], State.failed, None)
        found.tell(trials[2], State.done, math.nan)
        found.observe(trials[3], 10, 0.75)
        found.tell(trials[3], State.pruned, 0.7)
    complete, fail, pruned = TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED
    ends = [(complete, 0.5), (fail, None), (fail, None), (pruned, 0.75)]
    assert states(folder) == ends
    for _ in range(2):
        found.tell(trials[1], State.done, 0.25)
    assert states(folder) == [*ends, (complete, 0.25)]
    assert found.finished


def test_a_metric_that_no_trial_has_ends_the_search_once(tmp_path):
    found = search_of(tmp_path / "s", [RANKS, LR], metric="eval_channel_loss/poems")
    first, second = proposed(found, tmp_path, 0, free=2)
    for trial, row, fix in (
        (first, '{"step": 1, "eval/loss": 2.0, "eval_channel_loss/chat": 3.0, "lr": 1}\n',
         "its runs have eval/loss, eval_channel_loss/chat"),
        (second, '{"step": 1, "train/loss": 2.0}\n', "set data.eval or data.eval_fraction"),
    ):  # fmt: skip
        trial.folder.mkdir()
        (trial.folder / "metrics.jsonl").write_text(row)
        with pytest.raises(PosttrainError, match="without a value of eval_channel_loss/poems") as e:
            found.tell(trial, State.done, None)
        assert (e.value.where, e.value.fix) == ("hydra.sweeper.metric", fix)
        found.tell(trial, State.done, None)


def test_what_nobody_runs_is_proposed_again_with_its_values(tmp_path):
    folder = tmp_path / "s"
    found = search_of(folder, [RANKS, LR], n_trials=6)
    trials = proposed(found, folder, 0, free=4)
    again = search_of(folder, [RANKS, LR], n_trials=6, n_jobs=6)
    again.resume(trials[:2])
    assert not again.finished
    assert [p.overrides for p in again.ask(2)] == [trial.overrides for trial in trials[2:]]
    assert len(again.ask(9)) == 2
    assert again.finished


def test_a_journal_that_lacks_a_trial_is_refused(tmp_path):
    found = search_of(tmp_path / "s", [RANKS, LR])
    with pytest.raises(PosttrainError, match="lacks 1 of the trials") as caught:
        found.resume([Trial(0, ("seed=1",), tmp_path / "t", {"optuna": 7})])
    assert caught.value.where.endswith("study.journal")


def test_a_plan_restores_the_search(tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    planned = study.plan({"n_trials": 3, "direction": "maximize", "seed": 4}, [RANKS, "seed=9"])
    assert (planned["kind"], planned["metric"]) == ("posttrain_optuna", "eval/loss")
    sweep = Sweep(folder=folder, name="x", command="", created="", cwd="", search=planned)
    found = study.restore(sweep)
    assert all(p.overrides[1] == "seed=9" for p in found.ask(3))
    assert found.finished


# ---------------------------------------------------------------------------------- pruning


def observed(found: study.OptunaSearch, trial: Trial, curve: dict[int, float]) -> int | None:
    """The step at which a trial is given up."""
    for step, value in curve.items():
        if found.observe(trial, step, value):
            return step
    return None


def test_the_median_gives_up_what_is_worse_than_half(tmp_path):
    found = search_of(
        tmp_path / "s", [RANKS, LR], pruner="median", startup_trials=3, warmup_steps=20
    )
    trials = proposed(found, tmp_path, 0, free=6)
    for trial, value in zip(trials[:3], (1.0, 2.0, 3.0), strict=True):
        assert observed(found, trial, {0: 9.0, 10: value, 20: value, 30: value}) is None
        found.tell(trial, State.done, value)
    assert observed(found, trials[3], {0: 9.0, 10: 2.5, 20: 2.5}) == 20  # 10: before the warm-up
    assert observed(found, trials[4], {0: 9.0, 10: 5.0, 20: 1.9, 30: 1.9}) is None
    assert observed(found, trials[5], {20: math.nan}) == 20


def test_a_decision_to_give_up_outlives_the_driver(tmp_path):
    folder = tmp_path / "s"
    words = [RANKS, LR]
    found = search_of(folder, words, pruner="asha", reduction=2)
    trials = proposed(found, folder, 0, free=2)
    assert observed(found, trials[0], {10: 1.0, 20: 0.9, 40: 0.8}) is None
    assert observed(found, trials[1], {10: 1.5}) == 10
    again = search_of(folder, words, pruner="asha", reduction=2)
    again.resume(trials)
    assert observed(again, trials[0], {10: 1.0, 20: 0.9, 40: 0.8}) is None
    assert observed(again, trials[1], {10: 1.5, 20: 0.1}) == 10


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("reduction", [2, 3])
def test_asha_decides_as_optunas_own_pruner(direction, reduction):
    draws = random.Random(reduction)
    reference = optuna.create_study(
        direction=direction,
        pruner=SuccessiveHalvingPruner(min_resource=2, reduction_factor=reduction),
    )
    sign = 1 if direction == "minimize" else -1
    curves: list[dict[int, float]] = []
    pruned = 0
    for _ in range(60):
        trial, curve = reference.ask(), dict[int, float]()
        for step in range(1, 20):
            curve[step] = draws.gauss(0, 1)
            trial.report(curve[step], step)
            gives_up = not is_promoted(curve, curves, 2, reduction, sign)
            assert gives_up == trial.should_prune()
            if gives_up:
                pruned += 1
                break
        curves.append(curve)
        state = TrialState.PRUNED if gives_up else None
        value = None if gives_up else draws.random()
        reference.tell(trial, value, state)
    assert 20 < pruned < 60
