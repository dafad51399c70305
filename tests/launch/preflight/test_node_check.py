"""The preflight step, as Slurm would start it: a process for each node, here on one machine."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from posttrain_launch.preflight.meeting import Meeting, NotSeen, joined
from posttrain_launch.preflight.node_facts import folder_of

from posttrain_dist.config import RunConfig, Slurm, complete


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = complete(RunConfig(cluster=Slurm(nodes=2, gpus_per_node=0)))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    folder_of(tmp_path).mkdir(parents=True)
    return tmp_path


def check(run: Path, rank: int, deadline_s: int = 60, **variables: str) -> subprocess.Popen[str]:
    """The task of one of two nodes."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "SLURMD_NODENAME": f"node{rank + 1}",
        "SLURM_PROCID": str(rank),
        "SLURM_JOB_ID": "7",
        "POSTTRAIN_NODES": "node1 node2",
        "POSTTRAIN_HEAD_ADDRESS": "127.0.0.1",
        "POSTTRAIN_PREFLIGHT_DEADLINE": str(deadline_s),
        **variables,
    }
    command = [sys.executable, "-m", "posttrain_launch.preflight.node_check", str(run)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow  # tests/slurm does it by default, on two nodes
def test_two_nodes_meet_and_sum(run):
    tasks = [check(run, rank) for rank in range(2)]
    said = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    [line] = said[0][0].splitlines()
    assert line.startswith("preflight: 2 nodes with 0 GPUs each, versions and config equal, ")
    assert said[1][0] == ""
    verdict = json.loads((folder_of(run) / "verdict.json").read_text())
    assert (verdict["start"], verdict["passed"], verdict["findings"]) == ("7.0", True, [])
    for node in ("node1", "node2"):
        facts = json.loads((folder_of(run) / f"{node}.json").read_text())
        assert facts["all_reduce_gb_s"] > 0
        assert abs(facts["clock_s"]) < 0.5  # one clock
    assert not (folder_of(run) / "meeting.json").exists()


def test_a_node_that_never_comes_is_named_in_time(run):
    began = time.monotonic()
    first = check(run, 0, deadline_s=2)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 1
    assert said.startswith("preflight: error: node2: wrote nothing to the run folder in 2 s that ")
    assert time.monotonic() - began < 30


def test_a_node_that_sees_another_folder_names_itself(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    second = check(other, 1, deadline_s=1)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"error: node2: cannot use the run folder {other}: no such file" in said
    (other / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    second = check(other, 1, deadline_s=1)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "error: node2: does not see what node1 writes to " in said


def test_clocks_are_compared_by_the_shortest_round(run):
    with Meeting(run, "1.0", "127.0.0.1"), joined(run, "1.0", time.monotonic() + 10) as first:
        clock = first.clock(lambda: time.time() + 5.0)
    assert clock.ahead_s == pytest.approx(5.0, abs=0.2)
    assert 0 < clock.round_trip_s < 1


def test_the_verdict_is_heard_when_it_is_there(run):
    heard: list[str] = []

    def wait() -> None:
        with joined(run, "1.0", time.monotonic() + 10) as first:
            heard.append(first.say("verdict"))

    with Meeting(run, "1.0", "127.0.0.1") as meeting:
        guest = threading.Thread(target=wait)
        guest.start()
        guest.join(0.3)
        assert heard == []
        meeting.decide("go 1234 cpu")
        guest.join(10)
        assert heard == ["go 1234 cpu"]


def test_a_meeting_of_another_start_is_none(run):
    with (
        Meeting(run, "1.0", "127.0.0.1"),
        pytest.raises(NotSeen),
        joined(run, "1.1", time.monotonic() + 0.3),
    ):
        pass


def test_who_has_no_token_hears_nothing(run):
    with Meeting(run, "1.0", "127.0.0.1"):
        path = folder_of(run) / "meeting.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "token": "guessed"}))
        with joined(run, "1.0", time.monotonic() + 5) as first, pytest.raises(OSError):
            first.say("time")
