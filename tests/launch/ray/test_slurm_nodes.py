"""The nodes of a Slurm job that have not come to Ray are named."""

import pytest
from posttrain_launch.ray.job import missing_parts

from posttrain_dist.config import Slurm

NAMES = ["gpu1", "gpu2", "gpu3"]


def node(name: str, gpus: float = 4.0) -> dict:
    """As a row of `ray.nodes()`."""
    resources = {"CPU": 8.0} | ({"GPU": gpus} if gpus else {})
    return {"Labels": {"posttrain-node": name}, "Resources": resources, "Alive": True}


@pytest.mark.parametrize(
    ("alive", "missing"),
    [
        ([node(name) for name in NAMES], ""),
        ([node("gpu1"), node("gpu3")], "2 of 3 nodes have joined Ray; missing: gpu2"),
        ([node("gpu3")], "1 of 3 nodes have joined Ray; missing: gpu1, gpu2"),
        ([], "0 of 3 nodes have joined Ray; missing: gpu1, gpu2, gpu3"),
        (
            [node("gpu1"), node("gpu2", 3.0), node("gpu3", 0)],
            "not every node has 4 GPUs: gpu2 has 3, gpu3 has 0",
        ),
        # A node that came twice, after its raylet died, is one.
        ([node("gpu1"), node("gpu1"), node("gpu2")], "2 of 3 nodes have joined Ray; missing: gpu3"),
    ],
)
def test_who_is_missing_is_named(alive, missing):
    assert missing_parts(Slurm(nodes=3, gpus_per_node=4), NAMES, alive) == missing


def test_without_names_the_nodes_are_counted():
    cluster = Slurm(nodes=3)
    unlabelled = [{**node("", 0), "Labels": {}} for _ in range(3)]
    assert missing_parts(cluster, [], unlabelled[:2]) == "2 of 3 nodes have joined Ray"
    assert missing_parts(cluster, [], unlabelled) == ""
