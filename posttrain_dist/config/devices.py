"""The GPUs that are planned with: what each can do, as its maker states it. No torch.

Sources: NVIDIA's datasheets and architecture white papers of each product (dense figures: the ones
with sparsity are twice as large), and for memory what the driver reports: `nvidia-smi` shows
`memory_mib`, of which CUDA gives programs `cuda_mib` (`torch.cuda.get_device_properties`, and the
"total capacity" of its out-of-memory errors). The rest is kept by the driver.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU. Speeds in 10^12 operations/s or 10^9 bytes/s, of one direction."""

    product: str  # part of the name that nvidia-smi gives, in lower case; the longest match counts
    memory_mib: int
    cuda_mib: int
    bfloat16_tflops: float  # dense products, summed in float32
    float32_tflops: float
    memory_gb_s: float
    link_gb_s: float  # to the other GPUs of a node: NVLink where it has one, else PCIe
    host_link_gb_s: float
    compute_capability: float

    @property
    def memory_bytes(self) -> int:
        """What programs can have of it."""
        return self.cuda_mib * MIB


# name: product, MiB shown, MiB to CUDA, TFLOP/s bf16, fp32, GB/s memory, link, host, capability
DEVICES: dict[str, Device] = {
    "b200": Device("b200", 183359, 182630, 2250, 80, 8000, 900, 64, 10.0),
    "gh200": Device("gh200", 97871, 96768, 989, 67, 4000, 450, 450, 9.0),
    "h200": Device("h200", 143771, 143100, 989, 67, 4800, 450, 64, 9.0),
    "h200_nvl": Device("h200 nvl", 143771, 143100, 836, 60, 4800, 64, 64, 9.0),
    "h100": Device("h100", 81559, 81000, 989, 67, 3350, 450, 64, 9.0),
    "h100_nvl": Device("h100 nvl", 95830, 95200, 836, 60, 3900, 64, 64, 9.0),
    "h100_pcie": Device("h100 pcie", 81559, 81000, 756, 51, 2000, 64, 64, 9.0),
    "h800": Device("h800", 81559, 81000, 989, 67, 3350, 200, 64, 9.0),
    "h20": Device("h20", 97871, 97100, 148, 44, 4000, 450, 64, 9.0),
    "a100_80": Device("a100-sxm4-80gb", 81920, 81050, 312, 19.5, 2039, 300, 32, 8.0),
    "a100_40": Device("a100-sxm4-40gb", 40960, 40340, 312, 19.5, 1555, 300, 32, 8.0),
    "a100_80_pcie": Device("a100 80gb pcie", 81920, 81050, 312, 19.5, 1935, 32, 32, 8.0),
    "a100_40_pcie": Device("a100-pcie-40gb", 40960, 40340, 312, 19.5, 1555, 32, 32, 8.0),
    "a800": Device("a800-sxm4-80gb", 81920, 81050, 312, 19.5, 2039, 200, 32, 8.0),
    "l40s": Device("l40s", 46068, 45460, 362, 91.6, 864, 32, 32, 8.9),
    "l40": Device("l40", 46068, 45460, 181, 90.5, 864, 32, 32, 8.9),
    "l4": Device("l4", 23034, 22580, 121, 30.3, 300, 32, 32, 8.9),
    "rtx6000_ada": Device("rtx 6000 ada", 49140, 48500, 364, 91.1, 960, 32, 32, 8.9),
    "a6000": Device("rtx a6000", 49140, 48570, 155, 38.7, 768, 32, 32, 8.6),
    "a40": Device("a40", 46068, 45480, 150, 37.4, 696, 32, 32, 8.6),
    "a10": Device("a10", 23028, 22590, 125, 31.2, 600, 32, 32, 8.6),
    "a10g": Device("a10g", 23028, 22590, 70, 31.5, 600, 32, 32, 8.6),
    "rtx5090": Device("geforce rtx 5090", 32607, 32110, 209.5, 104.8, 1792, 64, 64, 12.0),
    "rtx_pro_6000": Device("rtx pro 6000", 97887, 97250, 504, 126, 1792, 64, 64, 12.0),
    "rtx4090": Device("geforce rtx 4090", 24564, 24200, 165.2, 82.6, 1008, 32, 32, 8.9),
    "rtx3090": Device("geforce rtx 3090", 24576, 24250, 71, 35.6, 936, 32, 32, 8.6),
    # Without units for bfloat16: such products run at the speed of float32.
    "v100": Device("v100-sxm2-32gb", 32768, 32490, 15.7, 15.7, 900, 150, 16, 7.0),
    "t4": Device("tesla t4", 15360, 14910, 8.1, 8.1, 320, 16, 16, 7.5),
}


def find_device(product: str, memory_mib: int, compute_capability: float) -> tuple[str, bool]:
    """The name in `DEVICES` of what nvidia-smi calls `product`.

    Returns:
        The name, and whether it is that product; else it is the one of the same compute
        capability, or of the nearest, whose memory is nearest.
    """
    words = product.lower().removeprefix("nvidia ")
    fits = [name for name, device in DEVICES.items() if _names(device.product, words)]
    if fits:
        return max(fits, key=lambda name: len(DEVICES[name].product)), True

    def distance(name: str) -> tuple[float, float]:
        device = DEVICES[name]
        apart = abs(device.compute_capability - compute_capability)
        return apart, abs(device.memory_mib - memory_mib)

    return min(DEVICES, key=distance), False


def _names(product: str, words: str) -> bool:
    """Whether the product's words stand in the name, whole: an L40S is no L40."""
    return f" {product} " in f" {words} "
