"""A search whose driver is killed at every event, each in a process of its own: JSON of the ends.

Usage: killed_search.py FOLDER RATES TRIALS LAST EVERY: kills at each EVERY-th fsync up to LAST,
before and behind it. One process imports Optuna, and its forks are the drivers. RATES are the
values of optimizer.lr, as an override has them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from posttrain_launch.sweep.folder import State, Trial, append_trials, read_trials, trial_folder
from posttrain_launch.sweep.search.options import OptunaSweeper
from posttrain_launch.sweep.search.space import read_space
from posttrain_launch.sweep.search.study import OptunaSearch


def value_of(overrides: tuple[str, ...]) -> float:
    """A closed form: best at rank 16 and lr 1e-3."""
    values = dict(word.split("=") for word in overrides)
    lr, rank = float(values["optimizer.lr"]), float(values["tuning.rank"])
    return abs(lr - 1e-3) * 1e3 + 1 / rank


def search(folder: Path, rates: str, trials: int) -> None:
    """Drive the search to its end; a trial has run where its folder holds `ran`, a byte a start."""
    options = OptunaSweeper(n_trials=trials, pruner="asha", startup_trials=3, reduction=2)
    words = ["tuning.rank=4,8,16", f"optimizer.lr={rates}"]
    found = OptunaSearch(folder, options, read_space(words))
    known = read_trials(folder)
    found.resume(known)
    for trial in known:
        run(found, trial)
    while not found.finished:
        new = found.ask(1)
        number = len(read_trials(folder))
        made = [
            Trial(number + i, p.overrides, trial_folder(folder, number + i), p.extra)
            for i, p in enumerate(new)
        ]
        append_trials(folder, made)
        for trial in made:
            run(found, trial)


def run(found: OptunaSearch, trial: Trial) -> None:
    trial.folder.mkdir(exist_ok=True)
    value, state = value_of(trial.overrides), State.done
    if not (trial.folder / "ran").exists():
        with (trial.folder / "ran").open("a") as file:
            file.write("x")
    for step in (1, 2, 4):
        if found.observe(trial, step, value + 1 / step):
            state = State.pruned
            break
    found.tell(trial, state, value)


def killed_at(number: int, after: bool, act: Callable[[], None]) -> bool:
    """Act in a process that is killed at its `number`-th fsync; whether it came so far."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    count, fsync = 0, os.fsync

    def counted(handle: int) -> None:
        nonlocal count
        count += 1
        if after:
            fsync(handle)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if not after:
            fsync(handle)

    os.fsync = counted
    act()
    os._exit(0)


def main(root: Path, rates: str, trials: int, last: int, every: int) -> None:
    ends = {}
    for number in range(1, last + 1, every):
        for after in (False, True):
            folder = root / f"{number}-{after}"
            folder.mkdir()
            was_killed = killed_at(number, after, lambda f=folder: search(f, rates, trials))
            killed_at(0, False, lambda f=folder: search(f, rates, trials))
            found = read_trials(folder)
            ends[folder.name] = {
                "killed": was_killed,
                "overrides": [trial.overrides for trial in found],
                "ran": [(trial.folder / "ran").read_text() for trial in found],
            }
    print(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
