"""What share of its stated speed a device reaches: the rates that step times follow from.

The best shapes of products reach 80 % of the peak on an H100 SXM, 86 % on an A100, 78 % on a B200
(S. Bekman, ML Engineering, "Maximum Achievable Matmul FLOPS"), those of LLMs 73 % on an H100
(SemiAnalysis, "MI300X vs H100 vs H200", part 1, 2024) and 64 to 69 % on a B200 (arXiv:2604.23466,
tables III and IV); hours of training, hot and with collectives beside them, less. The shares of the
H100, the A100 and of two GeForce were fitted to published trainings, so that what is measured here
is what a run reaches: `benchmarks/plan_speed.py` shows them all. Other devices stand to these as
their best shapes do. A GeForce sums bfloat16 in float32 at half the speed of its units, and is
bound by neither power nor memory: it comes near its peak.

Attention: FlashAttention-2 reaches 190 to 230 TFLOP/s on an A100, backward less (arXiv:2307.08691,
figures 4 to 6), and 35 % of an H100 (arXiv:2407.08608). A copy reaches 90 % of the memory's speed.
NCCL's bus bandwidth is 80 % of NVLink's speed, and of the ports of a node together; of PCIe that
all GPUs of a host share, less than half. CPU: measured on two cores, rough elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from posttrain_dist.config.devices import DEVICES
from posttrain_dist.planner.job import Job, Machine

# By compute capability, a share of the peak: products; attention with its backward.
_PRODUCTS = {7.0: 0.7, 7.5: 0.7, 8.0: 0.72, 8.6: 0.7, 8.9: 0.55, 9.0: 0.6, 10.0: 0.55, 12.0: 0.6}
_GEFORCE_PRODUCTS, _GEFORCE_ATTENTION = 0.9, 0.7
_ATTENTION = {7.0: 0.4, 7.5: 0.4, 8.0: 0.55, 8.6: 0.5, 8.9: 0.5, 9.0: 0.35, 10.0: 0.2, 12.0: 0.4}
_MEMORY = 0.9
_NVLINK = 0.8
_PCIE = 0.4  # of GPU to GPU through the host
_PCIE_GB_S = 64.0  # the fastest PCIe of the table of devices: what is faster is NVLink
_NETWORK = 0.8
_HOST_LINK = 0.8
LAUNCH_S = 8e-6  # until Python and autograd have started one kernel
# Of each doubling of the nodes: torchtitan's 8B goes 2.3 % slower on 16 nodes than on one.
WAITING = 0.006
_HOP_S = 2e-6  # of a ring, from one GPU to the next
# One CPU core: operations of products in float32 and bfloat16, bytes of memory, start of a kernel.
_CORE_FLOPS = {4: 0.07e12, 2: 0.15e12}
_CORE_BYTES_S = 8e9
_HOST_BYTES_S = 250e9  # of all cores of a host together
# DeepSpeed's CPU Adam updates 10^10 parameters a second on two sockets (arXiv:2101.06840, table 4).
_CPU_ADAM_PER_S, _CPU_ADAM_CORES = 1e10, 48


@dataclass(frozen=True, slots=True)
class Rates:
    """What one rank reaches, of operations or bytes in a second."""

    peak_flops: float  # stated, for MFU
    products: float
    attention: float
    memory: float
    collective: float  # bytes that each rank sends, all ranks at once
    latency_s: float  # of one collective
    host_link: float
    cpu_adam: float  # parameters of this rank
    storage: float  # of the whole run


def rates_of(job: Job) -> Rates:
    """The rates of a run's ranks."""
    machine = job.machine
    nodes = num_nodes(job)
    cores = machine.cpus_per_node / job.local_workers
    cpu_adam = _CPU_ADAM_PER_S * min(1.0, machine.cpus_per_node / _CPU_ADAM_CORES)
    if machine.gpu is not None:
        device = DEVICES[machine.gpu]
        half = job.value_bytes == 2
        peak = (device.bfloat16_tflops if half else device.float32_tflops) * 1e12
        capability = device.compute_capability
        # Products in float32 take no tensor cores: they come near their peak.
        products = peak * (_PRODUCTS[capability] if half else 0.8)
        attention = peak * (_ATTENTION[capability] if half else 0.5)
        if half and device.product.startswith("geforce"):
            products, attention = peak * _GEFORCE_PRODUCTS, peak * _GEFORCE_ATTENTION
        memory = device.memory_gb_s * 1e9 * _MEMORY
    else:
        peak = _CORE_FLOPS[job.value_bytes] * cores
        products = attention = peak
        share = _HOST_BYTES_S / machine.cpus_per_node
        memory = min(_CORE_BYTES_S, share) * cores
    return Rates(
        peak_flops=peak,
        products=products,
        attention=attention,
        memory=memory,
        collective=_collective(machine, job.workers, job.local_workers),
        latency_s=_HOP_S * (job.workers - 1),
        host_link=machine.host_link_bytes_s * _HOST_LINK,
        cpu_adam=cpu_adam / job.local_workers,
        storage=machine.storage_bytes_s * nodes,
    )


def num_nodes(job: Job) -> int:
    """Nodes that have a rank."""
    return math.ceil(job.workers / job.local_workers)


def _collective(machine: Machine, workers: int, local_workers: int) -> float:
    """Bytes a second that each rank sends in a gather, reduction or the like.

    A ring crosses from node to node once, and there are as many rings as a node has ports: what
    one rank sends is bound by all the ports of its node.
    """
    nvlink = machine.link_bytes_s > _PCIE_GB_S * 1e9
    link = machine.link_bytes_s * (_NVLINK if nvlink or machine.gpu is None else _PCIE)
    if workers <= local_workers:
        return link
    ports = machine.network_bytes_s * local_workers * _NETWORK
    return ports if local_workers == 1 else min(link, ports)
