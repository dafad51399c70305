"""A search that is killed anywhere, or finds half a line in its journal, goes on as undisturbed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from posttrain_launch.sweep.folder import State, Trial, trial_folder
from posttrain_launch.sweep.search.journal import FILE, cut_torn_line, open_study
from posttrain_launch.sweep.search.options import OptunaSweeper
from posttrain_launch.sweep.search.space import read_space
from posttrain_launch.sweep.search.study import OptunaSearch

WORKER = Path(__file__).parents[2] / "workers" / "killed_search.py"
WORDS = ["tuning.rank=4,8,16", "optimizer.lr=tag(log, interval(1e-5,1e-2))"]
OPTIONS = OptunaSweeper(n_trials=4, startup_trials=2)


# Any rate; and a space of which every trial is tried, where the sampler soon repeats itself.
RATES = {"tag(log, interval(1e-5,1e-2))": 8, "1e-5,1e-4,1e-3": 9}


@pytest.mark.parametrize(
    ("rates", "every"),
    [
        ("1e-5,1e-4,1e-3", 24),
        *(pytest.param(rates, 1, marks=pytest.mark.slow) for rates in RATES),
    ],
)
def test_kills_lose_no_trial_and_start_none_twice(rates, every, tmp_path):
    trials = RATES[rates]
    words = [str(tmp_path), rates, str(trials), "64", str(every)]
    done = subprocess.run(
        [sys.executable, str(WORKER), *words], capture_output=True, text=True, check=True
    )
    ends = json.loads(done.stdout)
    assert len(ends) == 2 * len(range(1, 65, every))
    undisturbed = ends["1-False"]["overrides"]  # killed before anything was written
    assert len({tuple(words) for words in undisturbed}) == trials
    for name, end in ends.items():
        assert end["killed"], name
        assert end["overrides"] == undisturbed, name
        assert end["ran"] == ["x"] * trials, name


def driven(folder: Path, most: int) -> list[Trial]:
    """A search up to `most` trials, of which the last one has not ended."""
    found = OptunaSearch(folder, OPTIONS, read_space(WORDS))
    trials: list[Trial] = []
    for number in range(most):
        if trials:
            found.tell(trials[-1], State.done, 1 / number)
        [new] = found.ask(1)
        trials.append(Trial(number, new.overrides, trial_folder(folder, number), new.extra))
    return trials


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line]


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_half_a_line_at_any_byte_is_proposed_again(every, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    trials = driven(whole, 4)
    content = (whole / FILE).read_bytes()
    begin = content.rfind(b"\n", 0, -1) + 1
    assert len(content) - begin > 100
    for end in {*range(begin, len(content), every), len(content) - 1}:
        folder = tmp_path / f"cut{end}" / "whole"  # the name of the folder is that of the study
        folder.mkdir(parents=True)
        (folder / FILE).write_bytes(content[:end])
        found = OptunaSearch(folder, OPTIONS, read_space(WORDS))
        found.resume(trials[:3])
        [again] = found.ask(1)
        assert again.overrides == trials[3].overrides
        found.tell(Trial(3, again.overrides, folder, again.extra), State.done, 0.125)
        assert {"op_code", "worker_id"} <= set.intersection(*map(set, lines_of(folder / FILE)))
        values = [trial.value for trial in open_study(folder, "minimize").trials]
        assert values == [1.0, 0.5, 1 / 3, 0.125]


def test_only_what_stands_behind_the_last_line_end_is_cut(tmp_path):
    path = tmp_path / FILE
    for content, left in ((b"", 0), (b'{"a"', 0), (b"{}\n", 3), (b"{}\n{}", 3), (b"{}\n{}\n", 6)):
        path.write_bytes(content)
        assert cut_torn_line(path) == len(content) - left
        assert path.read_bytes() == content[:left]
    assert cut_torn_line(tmp_path / "none") == 0
