"""Which trials find a place on a Ray cluster: closed forms."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from posttrain_launch.compose.composer import Composer
from posttrain_launch.compose.problems import compose_checked
from posttrain_launch.sweep.backends.on_ray import adjust, bundles_of, gpu_share, prepare
from posttrain_launch.sweep.backends.packing import Room, fits

from posttrain_dist.config import Ray, complete
from posttrain_dist.planner.settle import settle

GIB = 2**30
NODE = {"CPU": 16.0, "GPU": 4.0}


def started(room: Room, trials: list[list[dict]]) -> int:
    """How many of the trials begin at once, in their order."""
    count = 0
    for bundles in trials:
        if not room.take(bundles):
            break
        count += 1
    return count


@pytest.mark.parametrize(
    ("nodes", "bundles", "expected"),
    [
        ([NODE, NODE], [{"CPU": 1.0, "GPU": 1.0}], 8),
        ([NODE, NODE], [{"CPU": 8.0, "GPU": 1.0}], 4),  # the CPUs are what is short
        ([NODE, NODE], [{"CPU": 1.0, "GPU": 1.0}] * 3, 2),
        ([NODE, NODE], [{"CPU": 1.0, "GPU": 1.0}] * 8, 1),
        ([NODE], [{"CPU": 1.0, "GPU": gpu_share(10 * GIB, 32 * GIB)}], 12),  # three on each GPU
        ([{"CPU": 2.0}], [{"CPU": 1.0}], 2),
        # Six GPUs are free, and no node has four of them.
        ([{"CPU": 16.0, "GPU": 3.0}] * 2, [{"CPU": 1.0, "GPU": 4.0}], 0),
    ],
)
def test_as_many_begin_as_find_a_place(nodes, bundles, expected):
    free = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    assert started(Room(nodes, free, [], {}), [bundles] * 20) == expected
    assert fits(bundles, nodes) == (expected > 0)


def test_what_runs_and_what_others_hold_is_not_given_twice():
    trial = [{"CPU": 1.0, "GPU": 1.0}]
    # Three of ours were started; whether they have their workers yet changes nothing.
    for free_gpus in (8.0, 5.0):
        room = Room([NODE, NODE], {"CPU": 32.0, "GPU": free_gpus}, [trial] * 3, {})
        assert started(room, [trial] * 20) == 5
    # Others hold two: known from before ours began, or seen now.
    room = Room([NODE, NODE], {"CPU": 32.0, "GPU": 6.0}, [trial] * 3, {"GPU": 2.0})
    assert started(room, [trial] * 20) == 3
    assert started(Room([NODE, NODE], {"CPU": 32.0, "GPU": 2.0}, [], {}), [trial] * 20) == 2


@pytest.mark.parametrize(
    ("needed", "capacity", "share"),
    [(40, 80, 0.5), (41, 80, 1.0), (81, 80, 1.0), (26, 80, 0.3333), (1, 80, 0.125), (0, 80, 0.125)],
)
def test_the_part_of_a_gpu_follows_from_the_plan(needed, capacity, share):
    found = gpu_share(needed * GIB, capacity * GIB)
    assert found == share
    assert int(1 / found + 1e-9) * needed <= capacity or found == 1.0


@pytest.mark.parametrize(
    ("cluster", "count", "bundle"),
    [
        (Ray(workers=2, cpus_per_worker=3.0), 2, {"CPU": 3.0, "GPU": 1.0}),
        (Ray(workers=1, gpus_per_worker=0.25), 1, {"CPU": 1.0, "GPU": 0.25}),
        (Ray(), 8, {"CPU": 1.0, "GPU": 1.0}),  # as a run of its own: every GPU
    ],
)
def test_the_bundles_of_a_trial_are_those_of_its_workers(cluster, count, bundle):
    assert bundles_of(SimpleNamespace(cluster=cluster), [NODE, NODE]) == [bundle] * count


def test_without_gpus_a_trial_is_one_worker_on_cpus():
    assert bundles_of(SimpleNamespace(cluster=Ray()), [{"CPU": 8.0}]) == [{"CPU": 1.0}]


@pytest.mark.parametrize(
    ("model", "share", "is_one_of_many"),
    [("shape:qwen3-0.6b", True, True), ("shape:qwen3-0.6b", False, False),
     ("shape:llama3-70b", True, False)],
)  # fmt: skip
def test_trials_share_a_gpu_where_their_plans_say_that_they_fit(model, share, is_one_of_many):
    words = [f"model.path={model}", "hardware=h100x8", "tuning=lora", "cluster=ray"]
    words += ["engine=single", "data.max_length=512", "cluster.address=head:6379"]
    with Composer() as composer:
        composed = compose_checked(composer, words, contradictions=False)
    config = complete(prepare(composed.config))
    choice = settle(config, force=True).choice
    found = adjust({"share_gpus": share})(config, choice).cluster
    assert found.workers == 1
    plan = choice.chosen.plan
    together = round(1 / found.gpus_per_worker)
    assert (together > 1) == is_one_of_many
    if is_one_of_many:
        assert together * (plan.device.total_bytes + plan.margin_bytes) <= plan.capacity_bytes
        # One more would not fit, or there are as many as there may be.
        more = (together + 1) * (plan.device.total_bytes + plan.margin_bytes)
        assert more > plan.capacity_bytes or together == 8
