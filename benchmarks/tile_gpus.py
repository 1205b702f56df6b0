"""Describe the GPUs that the tile model knows: each rate that binds a GEMM, with its origin."""

from dataclasses import dataclass, replace
from typing import Literal

Basis = Literal["read", "measured", "assumed"]
"""``read``: published by the vendor; ``measured``: on such a GPU, before this project had one;
``assumed``: a guess, which anchors.py puts to the test."""


@dataclass(frozen=True)
class Constant:
    """A figure with its origin."""

    value: float
    unit: str
    basis: Basis
    source: str


@dataclass(frozen=True)
class Gpu:
    """Rates that bind a GEMM; those of one multiprocessor (SM) are per clock cycle."""

    name: str
    processors: Constant
    clock_ghz: Constant
    dense_tflops: Constant
    """The best that a dense GEMM reaches: clocks fall under load."""
    hbm_tb_per_s: Constant
    l2_tb_per_s: Constant
    shared_bytes_per_cycle: Constant
    """What one SM reads from and writes to shared memory: wgmma takes both operands from it, and
    copies land in it."""
    ends_cycles: Constant
    """Prologue and epilogue of a tile."""

    @property
    def flops_per_cycle(self) -> float:
        """FLOPs that one SM sustains: the card's rate over its SMs and its clock."""
        # TFLOP/s over GHz: 10^12 / 10^9.
        return self.dense_tflops.value * 1e3 / self.processors.value / self.clock_ghz.value

    @property
    def l2_bytes_per_cycle(self) -> float:
        """One SM's share of the L2's bandwidth."""
        return self.l2_tb_per_s.value * 1e3 / self.processors.value / self.clock_ghz.value


H100 = Gpu(
    name="h100",
    processors=Constant(132, "SMs", "read", "NVIDIA H100 SXM data sheet"),
    clock_ghz=Constant(1.755, "GHz", "assumed", "clock under load; the highest is 1.98"),
    dense_tflops=Constant(
        790, "TFLOP/s", "assumed", "others' H100: dense bfloat16, 8192 x 8192 x 8192"
    ),
    hbm_tb_per_s=Constant(
        3.0, "TB/s", "assumed", "others' H100: copy of a large buffer, reads and writes"
    ),
    l2_tb_per_s=Constant(7.0, "TB/s", "assumed", "30 bytes per SM and cycle"),
    shared_bytes_per_cycle=Constant(
        128, "bytes/cycle", "read", "CUDA C programming guide: 32 banks of 4 bytes"
    ),
    ends_cycles=Constant(1800, "cycles", "assumed", "four stages filled once, 64 KB stored once"),
)
# The same chip as an H100 with faster memory: only its bandwidth differs.
H200 = replace(
    H100,
    name="h200",
    hbm_tb_per_s=Constant(
        4.3, "TB/s", "assumed", "others' H200: copy of a large buffer, reads and writes"
    ),
)
GPUS = {gpu.name: gpu for gpu in (H100, H200)}
