"""What a sweep keeps on the disk, and its list of trials from Hydra's syntax."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from posttrain_launch.sweep.combinations import Combinations, plan
from posttrain_launch.sweep.create import shared_texts
from posttrain_launch.sweep.folder import (
    TRIALS,
    Sweep,
    Trial,
    append_trials,
    driving,
    read_sweep,
    read_trials,
    trial_folder,
    write_sweep,
)

from posttrain_dist.errors import ConfigError, PosttrainError


def sweep_of(tmp_path: Path, **changes) -> Sweep:
    given = {"name": "s", "command": "c", "created": "t", "cwd": "/", **changes}
    return Sweep(folder=tmp_path / "sweep", **given)


def trial(folder: Path, number: int) -> Trial:
    return Trial(number, (f"a={number}",), trial_folder(folder, number), {"optuna": number + 7})


def test_a_sweep_is_read_as_it_was_written(tmp_path):
    sweep = sweep_of(tmp_path, search={"kind": "basic", "trials": [["a=1"]]}, force=True)
    write_sweep(sweep)
    assert read_sweep(sweep.folder) == sweep
    with pytest.raises(FileExistsError):
        write_sweep(sweep)
    (sweep.folder / "sweep.json").write_text('{"name": "s", "other": 1}')
    with pytest.raises(PosttrainError, match=r"sweep\.json: holds no sweep: .*'other'"):
        read_sweep(sweep.folder)


def test_a_line_torn_at_any_byte_costs_that_trial_alone_and_the_next_one_nothing(tmp_path):
    append_trials(tmp_path, [trial(tmp_path, 0)])
    whole = (tmp_path / TRIALS).read_bytes()
    append_trials(tmp_path, [trial(tmp_path, 1)])
    both = (tmp_path / TRIALS).read_bytes()
    for cut in range(len(whole), len(both)):
        (tmp_path / TRIALS).write_bytes(both[:cut])
        assert read_trials(tmp_path) == [trial(tmp_path, 0)]
        append_trials(tmp_path, [trial(tmp_path, 1), trial(tmp_path, 2)])
        assert read_trials(tmp_path) == [trial(tmp_path, number) for number in range(3)]


def test_the_lock_of_a_sweep_is_free_as_soon_as_its_driver_is_gone(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from posttrain_launch.sweep.folder import driving\n"
        "with driving(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read(); os.kill(os.getpid(), 9)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"held\n"
    held = pytest.raises(PosttrainError, match="another process drives this sweep")
    with held, driving(tmp_path):
        pass
    child.communicate()
    with driving(tmp_path):
        pass


def test_values_become_trials_in_the_order_of_the_keys():
    found = plan({"params": None}, ["c=9", "a=1,2", "b=range(0,2)", "+experiment=x,y"])["trials"]
    assert found[0] == ["c=9", "a=1", "b=0", "+experiment=x"]
    assert [tuple(row[1:]) for row in found] == [
        (f"a={a}", f"b={b}", f"+experiment={x}") for a in (1, 2) for b in (0, 1) for x in "xy"
    ]
    with_params = plan({"params": {"d": "3,4"}}, ["a=1"])["trials"]
    assert with_params == [["d=3", "a=1"], ["d=4", "a=1"]]
    drawn = plan({}, ["a=shuffle(1,2,3)"])["trials"]
    assert sorted(drawn) == [["a=1"], ["a=2"], ["a=3"]]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["a=1,2,1"], "a=1 comes twice"),
        (["a=interval(1,2)"], "^a: is a range without steps"),
        (["b=1", "a=choice(x,x)"], "a=x comes twice"),
    ],
)
def test_what_is_no_list_of_different_trials_is_refused(typed, said):
    with pytest.raises(ConfigError, match=said):
        plan({}, typed)


def test_the_list_goes_on_behind_the_trials_that_there_are(tmp_path):
    search = Combinations([("a=1",), ("a=2",), ("a=3",)])
    search.resume([trial(tmp_path, 0)])
    assert not search.finished
    assert [each.overrides for each in search.ask(1)] == [("a=2",)]
    assert [each.overrides for each in search.ask(5)] == [("a=3",)]
    assert search.finished
    assert search.ask(1) == []


def test_what_all_trials_share_is_known_as_typed_and_as_hydra_writes_it():
    typed = ["train.save=false", "optimizer.lr=1e-4,1e-3", "cluster.time='00:15:00'", "~seed"]
    every = set(shared_texts(typed))
    for trial in plan({}, typed)["trials"]:
        own = [text for text in trial if text not in every]
        assert own in (["optimizer.lr=0.0001"], ["optimizer.lr=0.001"])
    assert "train.save=false" in every
