"""The machine of a plan: presets, the table of devices, what is here, and what contradicts it."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from posttrain_launch.compose.composer import Composer
from posttrain_launch.compose.problems import compose_checked

from posttrain_dist.config import (
    Hardware,
    Local,
    Ray,
    RunConfig,
    Slurm,
    complete,
    this_machine,
)
from posttrain_dist.config.devices import DEVICES, find_device
from posttrain_dist.config.this_machine import cpus_here, host_memory_bytes, look_here
from posttrain_dist.engine import DeepSpeed
from posttrain_dist.errors import ClusterError, ConfigError, SeveralErrors
from posttrain_dist.planner.machine import UnknownMachine, find_machine
from posttrain_dist.planner.make_job import count_workers
from posttrain_dist.preflight import check_inputs

GIB = 1 << 30
PRESETS = Path(__file__).resolve().parents[2] / "conf/hardware"
DESCRIBED = {"host_memory_gib": 1000.0, "cpus_per_node": 64}


def config_of(hardware: Hardware | None = None, cluster: object = None) -> RunConfig:
    config = RunConfig(hardware=hardware or Hardware(), cluster=cluster or Local())
    if not isinstance(config.cluster, Local):
        config.engine = DeepSpeed(stage=1)
    return complete(config)


def preset(name: str) -> Hardware:
    values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    values.pop("defaults")
    return Hardware(**values)


@pytest.fixture(scope="module")
def compose():
    """The completed configuration of a command line."""
    with Composer() as composer:
        yield lambda *words: complete(compose_checked(composer, list(words)).config)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Put an nvidia-smi on PATH that answers with the rows given: no machine here has a GPU."""

    def install(*rows: str, code: int = 0) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        lines = "\n".join(rows)
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return install


def h100(index: int) -> str:
    return f"{index}, GPU-{index:02}ab, NVIDIA H100 80GB HBM3, 81559, 551, 9.0"


# ----------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("name", "gpus", "gib"),
    [
        ("h100x8", 8, 79.1),
        ("h200x8", 8, 139.8),
        ("a100_80x8", 8, 79.2),
        ("rtx4090", 1, 23.6),
        ("l40s", 1, 44.4),
        ("gh200", 1, 94.5),
    ],
)
def test_a_preset_is_one_node_with_what_cuda_gives_of_its_gpus(name, gpus, gib):
    # Total capacities as torch's out-of-memory errors name them.
    machine = find_machine(config_of(preset(name)), plans_only=True)
    assert machine.gpus_per_node == gpus
    assert machine.gpu_memory_bytes / GIB == pytest.approx(gib, abs=0.2)
    assert machine.host_memory_bytes > gpus * machine.gpu_memory_bytes
    assert machine.link_bytes_s >= machine.network_bytes_s


def test_every_device_keeps_some_memory_to_itself_and_none_is_faster_than_its_peak():
    for name, device in DEVICES.items():
        assert 0.97 < device.cuda_mib / device.memory_mib < 1, name
        assert device.bfloat16_tflops >= device.float32_tflops, name
        assert device.link_gb_s >= device.host_link_gb_s, name


def test_a_preset_makes_what_a_job_asks_for(compose):
    words = ["cluster=slurm", "hardware=h100x8", "engine=zero3", "cluster.nodes=4"]
    cluster = compose(*words).cluster
    assert (cluster.gpus_per_node, cluster.cpus_per_node) == (8, 96)
    assert cluster.memory_per_node is None  # nobody asks Slurm for what a datasheet says
    half = compose(*words, "cluster.gpus_per_node=4")
    assert (half.cluster.gpus_per_node, half.cluster.cpus_per_node) == (4, 48)
    assert find_machine(half, plans_only=False).gpus_per_node == 4


def test_a_submission_needs_no_gpus_per_node_beside_hardware():
    hardware = Hardware(gpu="h100", gpus_per_node=8, **DESCRIBED)
    slurm = Slurm(nodes=2, time="1:00:00")
    config = RunConfig(cluster=slurm, engine=DeepSpeed(stage=1))
    with pytest.raises(ConfigError, match=r"cluster.gpus_per_node.*\n.*hardware=h100x8"):
        check_inputs(complete(config), "submit")
    check_inputs(complete(replace(config, hardware=hardware)), "submit")


# -------------------------------------------------------------------------------- contradictions


def test_a_job_cannot_ask_for_more_than_a_node_has():
    hardware = Hardware(gpu="h100", gpus_per_node=8, **DESCRIBED)
    with pytest.raises(ConfigError, match=r"cluster.gpus_per_node: is 16, and a node has 8"):
        config_of(hardware, Slurm(nodes=1, gpus_per_node=16))
    with pytest.raises(ConfigError, match=r"cluster.cpus_per_node: is 65, and a node has 64"):
        config_of(hardware, Slurm(nodes=1, gpus_per_node=8, cpus_per_node=65))


def test_a_gpu_that_is_not_known_and_none_at_all_are_refused_together():
    with pytest.raises(SeveralErrors) as refused:
        config_of(Hardware(gpu="h101", gpus_per_node=0))
    assert re.search(r"hardware.gpu: is h101.*\n.*h100_pcie", str(refused.value))
    assert "hardware.gpus_per_node: is 0, and hardware.gpu is h101" in str(refused.value)


def test_training_here_on_hardware_that_is_not_here_is_refused(driver):
    hardware = Hardware(gpu="h100", gpus_per_node=8)
    with pytest.raises(ClusterError, match=r"hardware: is h100, and .* which has no GPU, \d+ CPU"):
        check_inputs(config_of(hardware), "train")
    driver(*(h100(i) for i in range(4)))
    with pytest.raises(ClusterError, match=r"has 8 GPUs in a node, .* 4 x NVIDIA H100 80GB HBM3"):
        check_inputs(config_of(hardware), "train")
    with pytest.raises(ClusterError, match="is a100_80, and the training would start on this"):
        check_inputs(config_of(Hardware(gpu="a100_80")), "train")
    with pytest.raises(ClusterError, match="has 90 GiB in a GPU"):
        check_inputs(config_of(Hardware(gpu="h100", gpu_memory_gib=90)), "train")
    check_inputs(config_of(Hardware(gpu="h100", gpus_per_node=4, gpu_memory_gib=40)), "train")
    # A Ray that runs elsewhere, and a plan, have what they are said to have.
    check_inputs(config_of(Hardware(gpu="a100_80"), Ray(address="head:6379")), "train")
    find_machine(config_of(replace(hardware, **DESCRIBED)), plans_only=True)


# --------------------------------------------------------------------------------- what is here


def test_what_is_here_is_what_the_driver_and_the_system_say(driver):
    driver(*(h100(i) for i in range(2)))
    machine = find_machine(config_of(), plans_only=False)
    assert (machine.gpu, machine.gpus_per_node) == ("h100", 2)
    assert machine.gpu_memory_bytes == (81559 - 551) << 20
    assert machine.link_bytes_s == 450e9
    assert machine.cpus_per_node == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [("1", 1), ("0,2", 2), ("GPU-02ab", 1), ("", 0), ("-1", 0), ("0,7,1", 1)],
)
def test_gpus_that_cuda_would_hide_are_not_here(driver, monkeypatch, visible, gpus):
    driver(*(h100(i) for i in range(4)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert look_here().gpus == gpus


def test_a_cpu_plan_leaves_the_gpus_of_this_machine_alone(driver):
    driver(h100(0))
    machine = find_machine(config_of(preset("cpu")), plans_only=False)
    assert (machine.gpu, machine.gpus_per_node, machine.gpu_memory_bytes) == (None, 0, 0)
    assert machine.host_memory_bytes == host_memory_bytes()


def test_gpus_that_differ_and_a_driver_that_fails_are_named(driver):
    driver(h100(0), "1, GPU-1, NVIDIA A100-SXM4-80GB, 81920, 600, 8.0")
    with pytest.raises(ClusterError, match="differ: NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3"):
        look_here()
    driver("Failed to initialize NVML: Driver/library version mismatch", code=18)
    with pytest.raises(ClusterError, match=r"cannot be asked .* version mismatch"):
        look_here()
    driver("No devices were found", code=6)
    assert look_here().gpu is None


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100_80"),
        ("NVIDIA A100 80GB PCIe", "a100_80_pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000_ada"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
    ],
)
def test_a_product_is_found_by_its_whole_name(product, name):
    assert find_device(product, 0, 0.0) == (name, True)


def test_a_product_that_is_not_known_is_planned_as_the_nearest(driver, caplog):
    driver("0, GPU-0, NVIDIA GeForce RTX 4060 Ti, 16380, [N/A], 8.9")
    here = look_here()
    assert here.gpu == "l4"  # of its generation, with the memory that is nearest
    assert here.gpu_memory_bytes == 16380 << 20
    assert "RTX 4060 Ti is not in the table of devices; planned as l4" in caplog.text


def test_memory_and_cpus_are_those_of_the_container(tmp_path, monkeypatch):
    write(tmp_path / "proc/meminfo", "MemTotal:       1000000 kB\nMemFree: 1 kB\n")
    assert host_memory_bytes(tmp_path) == 1_000_000 * 1024
    write(tmp_path / "proc/self/cgroup", "0::/job/step\n")
    write(tmp_path / "sys/fs/cgroup/job/step/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/job/memory.max", "4096000\n")
    assert host_memory_bytes(tmp_path) == 4_096_000
    write(tmp_path / "proc/self/cgroup", "4:memory:/a\n1:cpu,cpuacct:/a\n")
    write(tmp_path / "sys/fs/cgroup/memory/a/memory.limit_in_bytes", "2048000\n")
    assert host_memory_bytes(tmp_path) == 2_048_000
    monkeypatch.setattr(this_machine.os, "sched_getaffinity", lambda _: set(range(16)))
    assert cpus_here(tmp_path) == 16
    write(tmp_path / "proc/self/cgroup", "0::/job\n")
    write(tmp_path / "sys/fs/cgroup/job/cpu.max", "350000 100000\n")
    assert cpus_here(tmp_path) == 3


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# ----------------------------------------------------------------------------------- elsewhere


def test_nodes_elsewhere_have_to_be_described():
    for cluster in (Slurm(nodes=2, gpus_per_node=8), Ray(address="head:6379")):
        with pytest.raises(UnknownMachine, match="not this machine") as refused:
            find_machine(config_of(cluster=cluster), plans_only=True)
        assert "hardware=h100x8" in str(refused.value)
        assert "hardware.gpu," in str(refused.value)
    # What a job asks for counts as said.
    slurm = Slurm(nodes=2, gpus_per_node=0, memory_per_node="64G", cpus_per_node=8)
    machine = find_machine(config_of(cluster=slurm), plans_only=False)
    assert (machine.gpu, machine.host_memory_bytes, machine.cpus_per_node) == (None, 64 * GIB, 8)


def test_a_job_has_of_a_node_what_it_asks_for():
    hardware = Hardware(gpu="h100", gpus_per_node=8, **DESCRIBED)
    slurm = Slurm(nodes=1, gpus_per_node=2, memory_per_node="200000", cpus_per_node=10)
    machine = find_machine(config_of(hardware, slurm), plans_only=False)
    assert machine.gpus_per_node == 2
    assert machine.host_memory_bytes == 200_000 << 20
    assert machine.cpus_per_node == 10


def test_what_is_typed_wins_over_the_table():
    hardware = Hardware(gpu="h100", gpus_per_node=8, gpu_memory_gib=70, link_gb_s=200, **DESCRIBED)
    machine = find_machine(config_of(hardware), plans_only=True)
    assert machine.gpu_memory_bytes == 70 * GIB
    assert machine.link_bytes_s == 200e9
    assert machine.host_link_bytes_s == 64e9


@pytest.mark.parametrize(
    ("cluster", "ranks"),
    [
        (Ray(), (8, 8)),
        (Ray(gpus_per_worker=0.5), (1, 1)),  # one worker, for none shares a GPU with its own
        (Ray(gpus_per_worker=0), (1, 1)),  # on CPUs, as where there is no GPU
        (Slurm(nodes=2, gpus_per_node=4), (8, 4)),
        (Slurm(nodes=2, gpus_per_node=4, gpus_per_worker=0), (2, 1)),
    ],
)
def test_ranks_are_planned_as_ray_places_them(cluster, ranks):
    hardware = Hardware(gpu="h100", gpus_per_node=8, **DESCRIBED)
    config = config_of(hardware, cluster)
    assert count_workers(config, find_machine(config, plans_only=True)) == ranks
