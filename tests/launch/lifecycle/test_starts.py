"""logs/starts.jsonl: what is kept of each start, and the history that it makes."""

import json

import pytest
from posttrain_launch.lifecycle import starts
from posttrain_launch.lifecycle.decide import Action, Cause, Start
from posttrain_launch.run.recorded_start import cause_of, recorded_start

from posttrain_dist.checkpoint.manifest import Layout, Manifest, Recipe, newest_step, step_name
from posttrain_dist.errors import ClusterError, ClusterLost, ConfigError, SeveralErrors


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def save(folder, step):
    """A whole checkpoint."""
    manifest = Manifest(step, Recipe([]), Layout("single", 1, "float32"))
    place = folder / "checkpoints" / step_name(step)
    place.mkdir(parents=True)
    (place / "MANIFEST.json").write_text(manifest.to_json())
    return place


def job(count=0, name="71"):
    return starts.Job(name, count, ["node1", "node2"])


def lines(folder):
    return [json.loads(line) for line in (folder / starts.FILE).read_text().splitlines()]


def test_a_start_is_two_lines(folder):
    save(folder, 20)
    number = starts.begin(folder, job())
    save(folder, 40)
    decision = starts.close(folder, number, 85, Cause.time_limit)
    first, second = lines(folder)
    assert first.pop("began") <= second.pop("ended")
    assert first == {
        "start": 1, "job": "71", "restart_count": 0, "nodes": ["node1", "node2"], "step": 20
    }  # fmt: skip
    assert second == {
        "start": 1, "step": 40, "code": 85, "cause": "time_limit", "action": "requeue",
        "reason": "the time limit was near",
    }  # fmt: skip
    assert decision.action is Action.requeue
    assert starts.begin(folder, job(1)) == 2


def test_the_last_word_on_a_start_counts(folder):
    number = starts.begin(folder, job())
    starts.close(folder, number, 85, Cause.time_limit)
    starts.close(folder, number, 85, Cause.preempted)
    [row] = starts.read(folder)
    assert (row["cause"], row["action"]) == ("preempted", "wait")


def test_a_start_that_left_no_word_ended_where_the_next_began(folder):
    starts.begin(folder, job())
    save(folder, 10)
    starts.begin(folder, job(1))
    save(folder, 30)
    assert starts.history(folder, "71") == [
        Start(0, 10, 75, Cause.killed),
        Start(10, 30, 75, Cause.killed),
    ]
    assert starts.history(folder, "71", before=2) == [Start(0, 10, 75, Cause.killed)]
    assert starts.history(folder, "72") == []


def test_a_torn_line_and_a_foreign_one_are_passed_over(folder):
    number = starts.begin(folder, job())
    starts.close(folder, number, 0, Cause.finished)
    with (folder / starts.FILE).open("a") as stream:
        stream.write('[1]\n{"start": 9, "ended": "x"}\n{"start": 2, "beg')
    assert [row["start"] for row in starts.read(folder)] == [1]


def test_a_checkpoint_counts_when_it_is_whole(folder):
    assert newest_step(folder) == 0
    for step in (900, 100_000, 1_000_000):  # the last name is longer, and sorts before
        place = save(folder, step)
    assert newest_step(folder) == 1_000_000
    (place / "MANIFEST.json").write_text("{")
    (folder / "checkpoints" / "step-2000000.partial").mkdir()
    assert newest_step(folder) == 100_000


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (None, 0)),
        ({"SLURM_JOB_ID": "71"}, ("71", 0)),
        ({"SLURM_JOB_ID": "71", "SLURM_RESTART_COUNT": "2"}, ("71", 2)),
        (
            {"SLURM_JOB_ID": "75", "SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "3"},
            ("71_3", 0),
        ),
    ],
)
def test_a_job_is_named_as_slurm_names_it(environment, expected):
    found = starts.this_job(environment | {"POSTTRAIN_NODES": "a b"})
    assert (found.id, found.restart_count) == expected
    assert found.nodes == ["a", "b"]


# ------------------------------------------------------------------------------- of the driver


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ConfigError("x"), Cause.bad_config),
        (SeveralErrors([ConfigError("x")]), Cause.bad_config),
        (ClusterError("x"), Cause.failed),
        (ClusterLost("x"), Cause.ray_lost),
        (RuntimeError("x"), Cause.failed),
        (KeyboardInterrupt(), Cause.stopped),
    ],
)
def test_an_error_is_the_cause_of_an_end(error, cause, folder):
    assert cause_of(error) is cause
    with pytest.raises(type(error)), recorded_start(folder):
        raise error
    [row] = starts.read(folder)
    assert row["cause"] == cause
    assert row["code"] == {"bad_config": 2, "ray_lost": 75, "stopped": 130}.get(cause, 1)


def test_slurm_does_not_start_a_run_for_ever(folder, monkeypatch):
    """Restarts after a lost node are Slurm's own: nobody of ours is there to end them."""
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    save(folder, 10)
    for count in range(3):
        starts.begin(folder, job(count))
    refused = pytest.raises(ClusterError, match=r"3 times in a row without progress.* step 10")
    with refused, recorded_start(folder):
        raise AssertionError("it trains")
    assert starts.read(folder)[-1]["action"] == "end"

    # Sent again by a person it is another job, and goes on.
    monkeypatch.setenv("SLURM_JOB_ID", "72")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    with recorded_start(folder) as start:
        start.cause = Cause.finished
    assert starts.read(folder)[-1]["code"] == 0


def test_a_start_that_made_progress_is_followed_by_another(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    for count in range(3):
        starts.begin(folder, job(count))
    save(folder, 10)  # of the third
    with recorded_start(folder) as start:
        start.cause = Cause.time_limit
    assert starts.read(folder)[-1]["action"] == "requeue"
