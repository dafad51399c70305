"""Which node is wrong, and what is said of it."""

import pytest
from posttrain_launch.preflight.gpu_state import Gpu, GpuState
from posttrain_launch.preflight.judge import Expected, judge, judge_all_reduce
from posttrain_launch.preflight.node_facts import NodeFacts

GIB = 1 << 30
NODES = ["n1", "n2", "n3"]


def facts(node: str, **values) -> NodeFacts:
    fine = {
        "start": "1.0",
        "versions": {"torch": "2.13.0", "ray": "2.60.0"},
        "config": "ab",
        "gpus": GpuState(2, [Gpu(i, "H100", 81559, 4, 0) for i in range(2)], "570"),
        "free_bytes": 100 * GIB,
        "temp_free_bytes": 10 * GIB,
        "shared_memory_bytes": GIB,
        "clock_s": 0.0,
        "round_trip_s": 0.001,
        "all_reduce_gb_s": 20.0,
    }
    return NodeFacts(node=node, **{**fine, **values})


def found(expected: Expected | None = None, **changes) -> list[tuple[str, str, bool]]:
    """What is found of three nodes, where some have other values: node, text, error or warning."""
    known = {
        node: facts(node, **changes.get(node, {})) for node in NODES if changes.get(node) != {}
    }
    expected = expected or Expected(nodes=NODES, gpus_per_node=2)
    return [(each.node, each.what, each.is_error) for each in judge(known, expected, 60)]


def one_gpu(**values) -> GpuState:
    gpu = Gpu(
        **{
            "index": 1,
            "name": "H100",
            "memory_mib": 81559,
            "used_mib": 4,
            "uncorrected_ecc": 0,
            **values,
        }
    )
    return GpuState(2, [Gpu(0, "H100", 81559, 4, 0), gpu], "570")


def test_nodes_that_are_equal_are_fine():
    assert found() == []


@pytest.mark.parametrize(
    ("node", "values", "text"),
    [
        (
            "n2",
            {"versions": {"torch": "2.12.0", "ray": "2.60.0"}},
            "torch is 2.12.0, and 2.13.0 on n1",
        ),
        ("n3", {"versions": {"torch": "2.13.0"}}, "ray is not installed, and 2.60.0 on n1"),
        (
            "n1",
            {"versions": {"torch": "2.12.0", "ray": "2.60.0"}},
            "torch is 2.12.0, and 2.13.0 on n2",
        ),
        ("n2", {"config": "cd"}, "reads another config.yaml than n1"),
        (
            "n3",
            {"gpus": GpuState(1, [Gpu(0, "H100", 81559, 4, 0)])},
            "the job sees 1 GPUs, and cluster.gpus_per_node is 2",
        ),
        (
            "n2",
            {"gpus": GpuState(0, fault="GPU {2} is lost.\nReboot")},
            "nvidia-smi GPU (2) is lost. Reboot",
        ),
        (
            "n2",
            {"gpus": one_gpu(uncorrected_ecc=17)},
            "GPU 1 (H100) counts 17 uncorrected ECC errors",
        ),
        (
            "n2",
            {"gpus": one_gpu(used_mib=40211)},
            "GPU 1 (H100) has 40211 of 81559 MiB in use by another process",
        ),
        (
            "n2",
            {"gpus": one_gpu(remap_failed=True)},
            "GPU 1 (H100) could not replace a bad row of its memory",
        ),
        (
            "n2",
            {"gpus": one_gpu(remap_pending=True)},
            "GPU 1 (H100) waits for a reset to replace a bad row of its memory",
        ),
        ("n2", {"gpus": one_gpu(memory_mib=None)}, "GPU 1 (H100) does not say its memory"),
        ("n3", {"unreachable": "timed out"}, "does not reach n1: timed out"),
        ("n2", {"clock_s": -75.0}, "its clock is 75.0 s behind that of n1"),
        ("n2", {"clock_s": 60.4, "round_trip_s": 0.6}, "its clock is 60.4 s ahead of that of n1"),
    ],
)
def test_the_node_that_is_wrong_is_named(node, values, text):
    errors = [(n, what) for n, what, is_error in found(**{node: values}) if is_error]
    assert errors == [(node, text)]


def test_a_node_that_wrote_nothing_is_named():
    [(node, what, is_error)] = found(n2={})
    assert (node, is_error) == ("n2", True)
    assert what == "wrote nothing to the run folder in 60 s that n1 sees"


def test_of_two_nodes_that_differ_the_second_one_is_named():
    known = {"n1": facts("n1"), "n2": facts("n2", config="cd")}
    [only] = judge(known, Expected(nodes=["n1", "n2"], gpus_per_node=2), 60)
    assert (only.node, only.what) == ("n2", "reads another config.yaml than n1")


def test_a_gpu_has_the_memory_that_was_planned_with():
    text = "GPU 1 (A100) has 40960 MiB, and the run was planned with 81920"
    small = {"gpus": one_gpu(name="A100", memory_mib=40960)}
    expected = Expected(nodes=NODES, gpus_per_node=2, gpu_memory_mib=81920)
    assert ("n2", text, True) in found(expected, n2=small)
    assert [each for each in found(expected) if each[2]] == []  # 81559 is near enough
    unplanned = Expected(nodes=NODES, gpus_per_node=2)
    assert [each for each in found(unplanned, n2=small) if each[2]] == []


def test_a_checkpoint_must_fit_on_the_disk():
    expected = Expected(nodes=NODES, gpus_per_node=2, checkpoint_bytes=60 * GIB, keep=2)
    assert {each[2] for each in found(expected)} == {False}  # room for one, not for three
    text = "100 GiB are free for the run folder, and checkpoint.keep=2 takes up to 180 GiB"
    assert [each[1] for each in found(expected)] == [text] * 3
    expected = Expected(
        nodes=NODES, gpus_per_node=2, checkpoint_bytes=60 * GIB, export_bytes=41 * GIB
    )
    text = "100 GiB are free for the run folder, and a checkpoint and the export take 101 GiB"
    assert found(expected) == [(node, text, True) for node in NODES]
    fits = Expected(
        nodes=NODES, gpus_per_node=2, checkpoint_bytes=30 * GIB, keep=2, export_bytes=10 * GIB
    )
    assert found(fits) == []


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"clock_s": 2.5}, "2.5 s ahead of"),
        ({"shared_memory_bytes": 64 << 20}, "in /dev/shm"),
        (
            {"gpus": one_gpu(name="H200", memory_mib=143771)},
            "H200, 143771 MiB, and others have H100",
        ),
        (
            {"gpus": GpuState(2, [Gpu(i, "H100", 81559, 4, 0) for i in range(2)], xids=["Xid 79"])},
            "Xid 79",
        ),
    ],
)
def test_what_a_run_may_survive_is_a_warning(values, part):
    [(node, what, is_error)] = found(n2=values)
    assert (node, is_error) == ("n2", False)
    assert part in what


def test_a_short_delay_is_no_skew():
    assert found(n2={"clock_s": 2.4, "round_trip_s": 1.0}) == []


def test_versions_of_the_submission_are_compared():
    expected = Expected(nodes=NODES, gpus_per_node=2, submitted={"torch": "2.12.0", "wandb": "1"})
    text = "torch is 2.13.0, and was 2.12.0 where the run was submitted"
    assert found(expected) == [("n1", text, False)]


def test_a_slow_network_is_a_warning_and_a_dead_one_an_error():
    expected = Expected(nodes=NODES, gpus_per_node=2, network_gb_s=40.0)
    known = {node: facts(node) for node in NODES}
    assert judge_all_reduce(known, expected, 60) == []  # 20 of 40 is half
    known["n3"] = facts("n3", all_reduce_gb_s=19.9)
    [slow] = judge_all_reduce(known, expected, 60)
    assert (slow.node, slow.is_error) == ("n3", False)
    assert "runs at 19.9 GB/s, and hardware.network_gb_s is 40" in slow.what
    known["n2"] = facts("n2", all_reduce_gb_s=None, all_reduce_error="Connection reset by peer")
    known["n3"] = facts("n3", all_reduce_gb_s=None)
    dead = judge_all_reduce(known, expected, 60)
    assert [(each.node, each.is_error) for each in dead] == [("n2", True), ("n3", True)]
    assert dead[0].what.endswith("failed: Connection reset by peer")
    assert dead[1].what == "the all-reduce over all nodes did not end in 60 s"


def test_a_line_names_node_fault_and_cure():
    known = {"n1": facts("n1"), "n2": facts("n2", gpus=GpuState(0, fault="does not start: {x}"))}
    [only] = judge(known, Expected(nodes=["n1", "n2"], gpus_per_node=2), 60)
    assert only.line() == (
        "preflight: error: n2: nvidia-smi does not start: (x); fix: have its administrator look at "
        "it (nvidia-smi -q), or leave it out: cluster.exclude=[n2]"
    )
