"""What Slurm has against a job, and the key that it is about; the answers are those of 22.05."""

import pytest
from posttrain_launch.batch.refusals import cure_of, never_starts

FAILED = "sbatch: error: Batch job submission failed: "


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ("sbatch: error: invalid partition specified: nowhere", "cluster.partition"),
        (FAILED + "Invalid account or account/partition combination specified", "cluster.account"),
        (FAILED + "Invalid qos specification", "cluster.qos"),
        (
            FAILED + "Requested time limit is invalid (missing or exceeds some limit)",
            "cluster.time",
        ),
        (FAILED + "Invalid feature specification", "cluster.constraint"),
        (FAILED + "Invalid generic resource (gres) specification", "cluster.gpus_per_node"),
        ("sbatch: error: Memory specification can not be satisfied", "cluster.memory_per_node"),
        ("sbatch: error: CPU count per node can not be satisfied", "cluster.cpus_per_node"),
        (FAILED + "Node count specification invalid", "cluster.nodes"),
        (FAILED + "Invalid node name specified", "cluster.exclude"),
        (FAILED + "Requested reservation is invalid", "cluster.reservation"),
        (FAILED + "Requested node configuration is not available", "cluster.nodes"),
        (FAILED + "Something that no version says", "cluster"),
    ],
)
def test_an_answer_names_its_key(answer, key):
    assert cure_of(answer).key == key


@pytest.mark.parametrize(
    ("why", "key"),
    [
        ("PartitionNodeLimit", "cluster.nodes"),
        ("PartitionTimeLimit", "cluster.time"),
        ("BadConstraints", "cluster.nodes"),
        ("QOSMaxNodePerJobLimit", "cluster"),
        ("AssocMaxWallDurationPerJobLimit", "cluster"),
        ("DependencyNeverSatisfied", "cluster.extra"),
        ("JobHeldUser", "cluster"),
    ],
)
def test_a_reason_that_never_ends_names_its_key(why, key):
    assert never_starts(why).key == key


@pytest.mark.parametrize(
    "why", ["Priority", "Resources", "BeginTime", "AssocGrpCpuLimit", "QOSMaxJobsPerUserLimit", ""]
)
def test_a_reason_that_ends_is_none(why):
    assert never_starts(why) is None
