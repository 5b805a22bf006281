"""What GPUs can do at most, from their vendors' data sheets: dense rates (no sparsity), at boost clocks.

No kernel reaches them: copies get to about nine tenths of a bandwidth, large matrix products to six to eight tenths of
a rate. A time worked out from them is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GB, TB, MiB, TFLOPS = 1e9, 1e12, 2**20, 1e12


@dataclass(frozen=True)
class Device:
    """A GPU in the kind of node that it is sold in. Bytes, bytes/s and FLOP/s; a multiply-add is two FLOPs."""

    name: str
    title: str
    architecture: str  # as Triton names it: "sm_90", "gfx942"
    memory: float
    bandwidth: float  # of the memory
    matrix: Mapping[str, float]  # by dtype: "bf16", "fp16" (float32 accumulators), "tf32", "fp32" (exact)
    vector: float  # float32 outside matrix units
    l2: float  # of the last cache before the memory
    link: float  # one direction, a GPU to all others of its node together
    gpus_per_node: int
    network: float  # one direction, a GPU to other nodes
    source: str
    multiprocessors: int = 100


def _matrix(half: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"bf16": half * TFLOPS, "fp16": half * TFLOPS, "tf32": tf32 * TFLOPS, "fp32": fp32 * TFLOPS}


# Networks are those of the vendor's own node: DGX A100 has 200 Gbit/s a GPU, DGX H100, H200 and B200 400, as have
# eight-GPU nodes of MI300X. Cards without such a node: PCIe for link, and an assumed 100 Gbit/s card that an L40S
# shares with one other, or 10 Gbit/s Ethernet that a desktop's GPUs share in pairs.
_DESKTOP = 10e9 / 8 / 2
_ALL = (
    Device(
        "a100-80gb", "NVIDIA A100 SXM 80 GB", "sm_80", 80 * GB, 2.039 * TB, _matrix(312, 156, 19.5), 19.5 * TFLOPS,
        40 * MiB, 300 * GB, 8, 25 * GB, "NVIDIA A100 data sheet (2021); DGX A100 data sheet", 108,
    ),
    Device(
        "h100", "NVIDIA H100 SXM 80 GB", "sm_90", 80 * GB, 3.35 * TB, _matrix(989.4, 494.7, 66.9), 66.9 * TFLOPS,
        50 * MiB, 450 * GB, 8, 50 * GB, "NVIDIA H100 data sheet and architecture white paper; DGX H100 data sheet", 132,
    ),
    Device(
        "h200", "NVIDIA H200 SXM 141 GB", "sm_90", 141 * GB, 4.8 * TB, _matrix(989.4, 494.7, 66.9), 66.9 * TFLOPS,
        60 * MiB, 450 * GB, 8, 50 * GB, "NVIDIA H200 and DGX H200 data sheets; L2 as its driver reports it", 132,
    ),
    Device(
        "b200", "NVIDIA B200 180 GB", "sm_100", 180 * GB, 7.7 * TB, _matrix(2250, 1125, 75), 75 * TFLOPS,
        126 * MiB, 900 * GB, 8, 50 * GB,
        "NVIDIA Blackwell data sheet, HGX B200; DGX B200 data sheet; L2 as its driver reports it", 148,
    ),
    Device(
        "l40s", "NVIDIA L40S 48 GB", "sm_89", 48 * GB, 864 * GB, _matrix(362, 183, 91.6), 91.6 * TFLOPS,
        96 * MiB, 32 * GB, 8, 6.25 * GB, "NVIDIA L40S data sheet; PCIe 4.0 x16; network assumed", 142,
    ),
    Device(
        "rtx-3090", "NVIDIA GeForce RTX 3090", "sm_86", 24 * GB, 936 * GB, _matrix(71, 35.6, 35.6), 35.6 * TFLOPS,
        6 * MiB, 32 * GB, 2, _DESKTOP, "NVIDIA Ampere GA102 white paper; PCIe 4.0 x16, no bridge; network assumed", 82,
    ),
    Device(
        "rtx-4090", "NVIDIA GeForce RTX 4090", "sm_89", 24 * GB, 1.008 * TB, _matrix(165.2, 82.6, 82.6), 82.6 * TFLOPS,
        72 * MiB, 32 * GB, 2, _DESKTOP, "NVIDIA Ada GPU architecture white paper; PCIe 4.0 x16; network assumed", 128,
    ),
    Device(
        "rtx-5090", "NVIDIA GeForce RTX 5090", "sm_120", 32 * GB, 1.792 * TB, _matrix(209.5, 104.8, 104.8),
        104.8 * TFLOPS, 96 * MiB, 64 * GB, 2, _DESKTOP,
        "NVIDIA RTX Blackwell GPU architecture white paper; PCIe 5.0 x16; network assumed", 170,
    ),
    Device(
        "mi300x", "AMD Instinct MI300X 192 GB", "gfx942", 192 * GB, 5.3 * TB, _matrix(1307.4, 653.7, 163.4),
        163.4 * TFLOPS, 256 * MiB, 448 * GB, 8, 50 * GB,
        "AMD Instinct MI300X data sheet and platform data sheet; l2 is the Infinity Cache; network assumed", 304,
    ),
)  # fmt: skip
DEVICES: dict[str, Device] = {one.name: one for one in _ALL}


def device(name: str) -> Device:
    """The device of that name.

    Raises:
        ValueError: one line that lists the names.
    """
    try:
        return DEVICES[name]
    except KeyError:
        raise ValueError(f"unknown GPU {name!r}: known are {', '.join(DEVICES)}") from None
