"""Where the workers of a run go, and what is said where they cannot."""

from dataclasses import replace

import pytest
from posttrain_launch.ray.placement import Node, missing_now, place, read_nodes, selects

from posttrain_dist.config import Placement, Ray, RunConfig, Slurm, problems
from posttrain_dist.errors import ClusterError

GIB = 1 << 30


def nodes(*resources):
    return [Node(f"n{i}", each) for i, each in enumerate(resources, 1)]


TWO_CPUS, GPU_NODE = {"CPU": 2.0}, {"CPU": 32.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("cluster", "there", "workers", "bundle", "strategy"),
    [
        (Ray(), [TWO_CPUS], 1, {"CPU": 1}, "PACK"),
        (Ray(workers=2), [TWO_CPUS], 2, {"CPU": 1}, "PACK"),
        (Ray(workers=2), [TWO_CPUS] * 2, 2, {"CPU": 1}, "SPREAD"),
        (Ray(workers=4, cpus_per_worker=0.5), [TWO_CPUS], 4, {"CPU": 0.5}, "PACK"),
        (Ray(cpus_per_worker=8), [GPU_NODE], 4, {"CPU": 8, "GPU": 1}, "PACK"),
        (Ray(cpus_per_worker=8), [GPU_NODE] * 2, 8, {"CPU": 8, "GPU": 1}, "PACK"),
        (Ray(gpus_per_worker=0.25), [GPU_NODE], 1, {"CPU": 1, "GPU": 0.25}, "PACK"),
        (Ray(gpus_per_worker=0, workers=3), [GPU_NODE], 3, {"CPU": 1}, "PACK"),
        (Slurm(nodes=3), [TWO_CPUS] * 3, 3, {"CPU": 1}, "SPREAD"),
        (Ray(workers=2, placement=Placement.STRICT_PACK), [TWO_CPUS] * 2, 2, {"CPU": 1}, None),
        (Ray(workers=2, placement=Placement.STRICT_SPREAD), [TWO_CPUS] * 2, 2, {"CPU": 1}, None),
        (
            Ray(memory_per_worker_gib=1.5, resources_per_worker={"disk": 1}),
            [TWO_CPUS | {"memory": 4.0 * GIB, "disk": 1.0}],
            1,
            {"CPU": 1, "memory": 1.5 * GIB, "disk": 1},
            "PACK",
        ),
    ],
)
def test_workers_follow_what_is_there(cluster, there, workers, bundle, strategy):
    found = place(cluster, nodes(*there))
    assert (found.workers, found.bundle) == (workers, bundle)
    assert found.strategy.value == (strategy or cluster.placement.value)
    assert found.use_gpu == ("GPU" in bundle)


@pytest.mark.parametrize(
    ("cluster", "there", "is_there", "fix"),
    [
        (Ray(workers=5), [TWO_CPUS], "2 CPUs and no GPU", "cluster.workers to at most 2"),
        (Ray(workers=5), [TWO_CPUS], "2 CPUs", "cluster.cpus_per_worker to at most 0.4"),
        # Three CPUs in all, but a worker lives on one node.
        (
            Ray(cpus_per_worker=2, workers=2),
            [TWO_CPUS, {"CPU": 1.0}],
            "2 nodes, with places for n1 1, n2 0",
            "at most 1",
        ),
        (Ray(workers=3), [{"CPU": 9.0, "GPU": 2.0}], "2 GPUs", "cluster.workers to at most 2"),
        # Half of all CPUs does not fit twice on the larger node and once on the smaller.
        (Ray(workers=3), [{"CPU": 1.0}, {"CPU": 0.9}], "1.9 CPUs", "per_worker to at most 0.5"),
        (Ray(workers=1, cpus_per_worker=3), [TWO_CPUS], "2 CPUs", "at most 2"),
        (Ray(workers=9, cpus_per_worker=3), [TWO_CPUS], "2 CPUs", "at most 0.22"),
        (Ray(workers=999), [TWO_CPUS], "2 CPUs", "cluster.workers to at most 2"),
        (
            Ray(workers=999, cpus_per_worker=3),
            [TWO_CPUS],
            "2 CPUs",
            "cluster.workers to at most 2 and cluster.cpus_per_worker to 1",
        ),
        # Four places, of which no node has more than two, and two nodes.
        (
            Ray(workers=3, placement=Placement.STRICT_PACK),
            [TWO_CPUS] * 2,
            "all on one node, each with 1 CPUs, and there are 2 nodes with places for n1 2, n2 2",
            "cluster.workers to at most 2, or use cluster.placement=PACK",
        ),
        (
            Ray(workers=3, placement=Placement.STRICT_SPREAD),
            [TWO_CPUS] * 2,
            "each on a node of its own, each with 1 CPUs",
            "cluster.workers to at most 2, or use cluster.placement=PACK",
        ),
        # Memory for one of the two that the CPUs would hold.
        (
            Ray(workers=2, memory_per_worker_gib=3),
            [TWO_CPUS | {"memory": 4.0 * GIB}],
            "each with 1 CPUs and 3 GiB",
            "cluster.workers to at most 1",
        ),
    ],
)
def test_more_workers_than_resources_names_both(cluster, there, is_there, fix):
    with pytest.raises(ClusterError) as failure:
        place(cluster, nodes(*there))
    assert failure.value.where == "cluster.workers"
    assert is_there in failure.value.what
    assert fix in failure.value.fix
    assert "at most 0," not in f"{failure.value.fix}," and failure.value.fix


@pytest.mark.parametrize(
    ("cluster", "where", "what"),
    [
        (
            Ray(resources_per_worker={"disk": 2}),
            "cluster.resources_per_worker.disk",
            "is 2, and no node has as much: n1 0, n2 1",
        ),
        (
            Ray(memory_per_worker_gib=9),
            "cluster.memory_per_worker_gib",
            "is 9, and no node has more than 4 GiB for Ray",
        ),
        (
            Ray(labels={"kind": "a", "zone": "west"}),
            "cluster.labels.zone",
            "is west, and of 2 nodes none has such labels: n1 (kind=a), n2 (kind=a, zone=east)",
        ),
    ],
)
def test_what_no_node_has_is_named_with_what_each_has(cluster, where, what):
    there = [
        Node("n1", TWO_CPUS | {"memory": 4.0 * GIB}, {"kind": "a", "ray.io/node-id": "f00"}),
        Node("n2", TWO_CPUS | {"disk": 1.0}, {"kind": "a", "zone": "east"}),
    ]
    with pytest.raises(ClusterError) as failure:
        place(cluster, there)
    assert (failure.value.where, failure.value.what) == (where, what)


def test_labels_choose_the_nodes_that_count():
    west, east = {"CPU": 1.0}, {"CPU": 4.0}
    there = [Node("n1", west, {"zone": "west"}), Node("n2", east, {"zone": "east"})]
    assert place(Ray(workers=4, labels={"zone": "east"}), there).labels == {"zone": "east"}
    with pytest.raises(ClusterError, match="there are 1 CPUs"):
        place(Ray(workers=2, labels={"zone": "!east"}), there)


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [("a", ["a"]), ("!a", ["b", None]), ("in(a, c)", ["a"]), ("!in(a,c)", ["b", None])],
)
def test_selectors_mean_what_they_mean_to_ray(selector, chosen):
    assert [value for value in ("a", "b", None) if selects(selector, value)] == chosen


def test_what_others_hold_is_listed():
    places = place(Ray(workers=2, cpus_per_worker=2), nodes({"CPU": 4.0}))
    assert missing_now(places, {"CPU": 4.0}) == []
    assert missing_now(places, {"CPU": 1.5}) == ["1.5 of 4 CPU"]


def test_nodes_that_are_gone_do_not_count():
    alive = {"Alive": True, "NodeManagerHostname": "h1", "Resources": TWO_CPUS, "Labels": {"a": ""}}
    dead = alive | {"Alive": False, "NodeManagerHostname": "h2"}
    assert read_nodes([dead, alive]) == [Node("h1", TWO_CPUS, {"a": ""})]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"gpus_per_worker": 2}, "cluster.gpus_per_worker"),
        ({"gpus_per_worker": 0.5, "workers": 2}, "cluster.gpus_per_worker"),
        ({"memory_per_worker_gib": 0}, "cluster.memory_per_worker_gib"),
        ({"resources_per_worker": {"GPU": 1}}, "cluster.resources_per_worker.GPU"),
        ({"resources_per_worker": {"disk": 1.5}}, "cluster.resources_per_worker.disk"),
        ({"labels": {"zone": "west coast"}}, "cluster.labels.zone"),
        ({"environment": {"WANDB_API_KEY": "x"}}, "cluster.environment.WANDB_API_KEY"),
        ({"environment": {"hf_token": "x"}}, "cluster.environment.hf_token"),
        ({"environment": {"RAY_ADDRESS": "x"}}, "cluster.environment.RAY_ADDRESS"),
        ({"environment": {"A-B": "x"}}, "cluster.environment.A-B"),
        ({"address": "http://user:word@head:8265"}, "cluster.address"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_its_key(changes, key):
    good = Ray(
        gpus_per_worker=0.5,
        labels={"zone": "!in(a, b)"},
        environment={"TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "INFO", "KEYBOARD": "us"},
        resources_per_worker={"disk": 0.5, "node:10.0.0.1": 2},
        address="http://head:8265",
    )
    assert problems(RunConfig(cluster=good)) == []
    [problem] = problems(RunConfig(cluster=replace(good, **changes)))
    assert problem.where == key and problem.fix
