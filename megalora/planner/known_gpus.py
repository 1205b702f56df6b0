"""Name the GPUs that can be planned for without having one. Every rate is assumed.

Data sheets give peaks; what kernels reach of them is assumed here, alike for all GPUs of which
nobody's measurements were at hand: a GEMM 0.75, a grouped GEMM 0.6, attention 0.4 forward and 0.13
backward (in FLOPs of forward, of which it does 2.5 times as many), memory 0.87, links inside a node
0.75 and network adapters 0.8. Memory that a program can have is a little less than what is sold.
"""

from megalora.planner.hardware import Constant, Links, Machine, Overhead, Roofline

GIB = 2**30
HOST = Overhead(2.6e-3, 1.8e-3, 11.4e-3, hidden=True, basis="assumed", exposed=0.5)
"""4.4 ms of launches for a layer and 11.4 ms once a step, as calibration measured them on the host
of one H100; three fifths are forward's, by a profile. How much is exposed behind a wait was not
measured: between all of it and what is slower than the device."""


def _gpu(
    name: str, memory_gib: int, dense: float, grouped: float, attention: tuple[float, float],
    memory: float,
    inside: float, outside: float, ranks_per_node: int = 8,
    source: str = "rates of the GPU in general",
) -> Machine:  # fmt: skip
    """TFLOP/s of dense and grouped GEMMs and of attention forward and backward, TB/s of memory,
    GB/s of a GPU's links."""
    forward, backward = attention
    return Machine(
        name=name,
        memory_bytes=memory_gib * GIB,
        ranks_per_node=ranks_per_node,
        gemm=Roofline(dense * 1e12, memory * 1e12),
        grouped_gemm=Roofline(grouped * 1e12, memory * 1e12),
        attention=Constant(forward * 1e12),
        attention_backward=Constant(backward * 1e12),
        memory=Constant(memory * 1e12),
        network=Links(inside * 1e9, outside * 1e9),
        overhead=HOST,
        note=f"assumed: {source}, {ranks_per_node} in a node, one network adapter for each",
    )


def _from_sheet(
    name: str, memory_gib: int, peak: float, memory: float, inside: float, outside: float,
    source: str, ranks_per_node: int = 8,
) -> Machine:  # fmt: skip
    """A GPU of which only published peaks are known.

    Args:
        memory_gib: GiB that a program can have.
        peak: TFLOP/s of dense bfloat16 products, without sparsity.
        memory: TB/s.
        inside: GB/s of a GPU's links to the others of its node, one way.
        outside: GB/s of its network adapter, one way.
        source: where the peaks are from, with a date.
    """
    return _gpu(
        name, memory_gib, 0.75 * peak, 0.6 * peak, (0.4 * peak, 0.13 * peak), 0.87 * memory,
        0.75 * inside, 0.8 * outside, ranks_per_node, f"shares of the peaks of {source}",
    )  # fmt: skip


GPUS = {
    # H100 and H200: 790 TFLOP/s dense, 3.0 and 4.3 TB/s, grouped GEMM 637 are others' measurements.
    # The rest, and all of A100 and B200, are data sheets times what is usually reached: GEMM 0.75
    # to 0.8, memory 0.85 to 0.9, links 0.75 to 0.85.
    "h100": _gpu("H100 SXM 80 GB", 78, 790, 637, (420, 140), 3.0, 340, 42),
    "h200": _gpu("H200 SXM 141 GB", 139, 790, 637, (420, 140), 4.3, 340, 42),
    "a100": _gpu("A100 SXM 80 GB", 78, 250, 200, (190, 60), 1.75, 230, 20),
    "b200": _gpu("B200 180 GB", 177, 1700, 1200, (700, 230), 7.0, 680, 42),
    # The 80 GB card's chip and links with slower memory: 1,555 GB/s.
    "a100-40gb": _gpu(
        "A100 SXM 40 GB", 39, 250, 200, (190, 60), 1.35, 230, 20,
        source="NVIDIA's A100 data sheet (2021), memory at 0.87 of its peak",
    ),
    # PCIe 4.0 x16 is 32 GB/s each way, and a node of such cards shares one adapter of 200 Gbit/s
    # between two.
    "l40s": _from_sheet(
        "L40S 48 GB", 44, 362, 0.864, 32, 12.5, "NVIDIA's L40S data sheet (2023)"
    ),
    # 165.2 with float32 sums. GeForce cards send through the host's memory: a quarter of PCIe.
    "rtx4090": _from_sheet(
        "RTX 4090 24 GB", 23, 165.2, 1.008, 8, 3, "NVIDIA's Ada whitepaper (2023)"
    ),
    "h20": _from_sheet("H20 96 GB", 94, 148, 4.0, 450, 50, "the press on NVIDIA's H20 (2023)"),
    "b300": _from_sheet("B300 270 GB", 265, 2250, 8.0, 900, 100, "NVIDIA's HGX B300 (2025)"),
    # An NVLink domain of 72 is what the planner takes for a node.
    "gb200": _from_sheet(
        "GB200 NVL72 186 GB", 183, 2500, 8.0, 900, 50, "NVIDIA's GB200 NVL72 (2024)", 72
    ),
    # Seven links of 64 GB/s each way. Rates alone: megalora has not run on ROCm.
    "mi300x": _from_sheet(
        "MI300X 192 GB", 190, 1307.4, 5.3, 448, 50, "AMD's MI300X data sheet (2023)"
    ),
}  # fmt: skip
"""Machines by the name that ``--gpu`` takes. Nothing here was measured by megalora."""


def known_gpu(name: str) -> Machine | None:
    """The machine of ``GPUS`` that a device's name means: ``NVIDIA H100 80GB HBM3``, ``NVIDIA
    GeForce RTX 4090``, ``NVIDIA A100-SXM4-40GB``; None where it is none of them."""
    plain = _plain(name)
    if "a100" in plain and "40gb" in plain:
        return GPUS["a100-40gb"]
    # The longest first: h20 is the beginning of h200, and b200 the end of gb200.
    for key in sorted(GPUS, key=len, reverse=True):
        if key in plain:
            return GPUS[key]
    return None


CPU_LIKE = Machine(
    name="cpu", memory_bytes=2**33, ranks_per_node=1, gemm=Roofline(5e10, 1e10),
    grouped_gemm=Roofline(3e10, 1e10), attention=Constant(2e10),
    attention_backward=Constant(1e10), memory=Constant(5e9), network=Links(1e9, 1e8),
    overhead=Overhead(1e-3, 2e-3, 1e-2, hidden=False, basis="assumed"), dtype="float32",
    note="guessed",
)  # fmt: skip
"""A rank on a few cores, to the order of magnitude: it orders layouts before anything is measured,
and no plan shows it."""


def like_device(name: str) -> Machine:
    """A machine whose layouts rank roughly as those of the named device: the GPU of ``GPUS``, an
    H100 for another one, ``CPU_LIKE`` for a CPU."""
    if "cpu" in name.lower():
        return CPU_LIKE
    return known_gpu(name) or GPUS["h100"]


def _plain(name: str) -> str:
    """A name in small letters without blanks: ``rtx4090``, ``a100-sxm4-40gb``."""
    return "".join(name.lower().split())
