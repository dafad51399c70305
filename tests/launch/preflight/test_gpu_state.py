"""GPUs as nvidia-smi has them. The program stands in for one that no test machine has."""

import json
from pathlib import Path

import pytest
from posttrain_launch.preflight import gpu_state
from posttrain_launch.preflight.gpu_state import Gpu, look_at_gpus

# As nvidia-smi prints it with --format=csv,noheader,nounits: four GPUs, the second one without ECC.
GPUS = """\
0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 4, 0, 570.86.15
1, GPU-bb, NVIDIA H100 80GB HBM3, 81559, 4, [N/A], 570.86.15
2, GPU-cc, NVIDIA H100 80GB HBM3, 81559, 40211, 0, 570.86.15
3, GPU-dd, NVIDIA H100 80GB HBM3, 81559, 4, 17, 570.86.15
"""
REMAPPED = "GPU-aa, No, No\nGPU-bb, Yes, No\nGPU-cc, No, No\nGPU-dd, No, Yes\n"
LOST = (
    "Unable to determine the device handle for GPU2: 0000:3B:00.0: GPU is lost.  Reboot the system "
    "to recover this GPU\n"
)
XID = "[ 1234.5] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', GPU has fallen off the bus.\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Has programs that print what they are given."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(name: str, text: str, code: int = 0, seconds: float = 0) -> None:
        program = tmp_path / name
        cases = json.loads(text) if text.startswith("{") else {"*": text}
        lines = ["#!/bin/bash", f"sleep {seconds}", 'case "$*" in']
        for pattern, printed in cases.items():
            (tmp_path / f"{name}.{len(lines)}").write_text(printed)
            lines.append(f"{pattern}) cat {tmp_path}/{name}.{len(lines)} ;;")
        program.write_text("\n".join([*lines, "esac", f"exit {code}"]))
        program.chmod(0o755)

    make("dmesg", "")
    return make


def both() -> str:
    return json.dumps({"*--query-gpu=*": GPUS, "*--query-remapped-rows=*": REMAPPED})


def test_what_nvidia_smi_says_is_read(machine):
    machine("nvidia-smi", both())
    state = look_at_gpus({})
    assert (state.count, state.driver, state.fault) == (4, "570.86.15", None)
    name = "NVIDIA H100 80GB HBM3"
    assert state.gpus == [
        Gpu(0, name, 81559, 4, 0),
        Gpu(1, name, 81559, 4, None, remap_pending=True),
        Gpu(2, name, 81559, 40211, 0),
        Gpu(3, name, 81559, 4, 17, remap_failed=True),
    ]


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("1,3", [1, 3]),
        ("4,5,6,7", [0, 1, 2, 3]),
        ("4,5", []),
        ("GPU-cc", [2]),
        ("", []),
        ("all", [0, 1, 2, 3]),
        ("NoDevFiles", []),
    ],
)
def test_only_the_jobs_gpus_count(visible, indices, machine):
    machine("nvidia-smi", both())
    state = look_at_gpus({"CUDA_VISIBLE_DEVICES": visible})
    assert [gpu.index for gpu in state.gpus] == indices
    assert state.count == len(indices)


def test_parts_of_a_gpu_are_counted(machine):
    machine("nvidia-smi", both())
    state = look_at_gpus({"CUDA_VISIBLE_DEVICES": "MIG-1a,MIG-2b"})
    assert (state.count, state.gpus, state.driver) == (2, [], "570.86.15")


def test_a_gpu_that_is_lost_is_a_fault_of_the_node(machine):
    machine("nvidia-smi", LOST, code=15)
    machine("dmesg", "usb\n" + XID)
    state = look_at_gpus({})
    assert state.count == 0
    assert state.fault.startswith("Unable to determine the device handle for GPU2")
    assert state.xids == [XID.strip()]


def test_an_nvidia_smi_that_hangs_is_a_fault_of_the_node(machine, monkeypatch):
    monkeypatch.setattr(gpu_state, "TIMEOUT_S", 0.2)
    machine("nvidia-smi", GPUS, seconds=5)
    assert look_at_gpus({}).fault == "gives no answer in 0 s"


def test_without_nvidia_smi_slurm_says_how_many_there_are(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look_at_gpus({"SLURM_GPUS_ON_NODE": "3"}).count == 3
    assert look_at_gpus({"SLURM_GPUS_ON_NODE": "3", "CUDA_VISIBLE_DEVICES": "4,5"}).count == 2
    assert look_at_gpus({}).count == 0
