"""Compute the grouped GEMM with quack-kernels instead of torch, behind the same function of ours.

quack-kernels (Apache-2.0, CuTe DSL) compiles for the GPU at first use, without nvcc, in 4 to 7 s a
kernel. Operands (``AugmentedWeight``), the passes between and autograd stay ours, so that an arm
differs from ``ours grouped_mm joined`` in the GEMM alone.

Shape legend: M routed rows   E experts   K inputs   N outputs
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.arms import Arm

Tile = dict[str, Any]
OWN_CHOICE: Tile = {}
"""quack's default: tiles of 128 x 192, one for each warp group."""
WIDE: Tile = {
    "tile_m": 128, "tile_n": 256, "pingpong": False, "cluster_m": 2, "cluster_n": 1,
    "is_dynamic_persistent": False,
}  # fmt: skip
"""The tile that reads the fewest bytes per FLOP; both warp groups work on one."""


class QuackGemm:
    """quack's GEMM with the arguments of torch's ``grouped_mm``."""

    def __init__(self, tile: Tile) -> None:
        """Import quack; nothing is compiled yet.

        Raises:
            ModuleNotFoundError: it, or the compiler that it needs, is not installed.
        """
        _find_cutlass()
        interface = importlib.import_module("quack.gemm_interface")
        config = importlib.import_module("quack.gemm_config").GemmConfig
        # The function behind the tuner: one config, no sweep.
        self.gemm: Callable[..., object] = interface.gemm_tuned.fn
        self.config = config(**tile) if tile else None
        self.calls = 0
        self.ends: Tensor | None = None
        self.bounds: Tensor | None = None

    def __call__(self, x_MK: Tensor, w_EKN: Tensor, *, offs: Tensor) -> Tensor:
        """Return ``x[m] @ w[e]`` for the rows m of every expert e, which ends at ``offs[e]``."""
        # quack wants the boundaries with a leading 0. Made once for each routing, as a layer would
        # keep them: made at each call, the padding would be timed too.
        if offs is not self.ends:
            self.ends = offs
            self.bounds = F.pad(offs, (1, 0))
        self.calls += 1
        out_MN = x_MK.new_empty(x_MK.shape[0], w_EKN.shape[2])
        self.gemm(x_MK, w_EKN, out_MN, cu_seqlens_m=self.bounds, config=self.config)
        return out_MN


def _find_cutlass() -> None:
    """Make ``import cutlass`` work from a folder on PYTHONPATH, whose .pth file nobody reads."""
    if importlib.util.find_spec("cutlass") is not None:
        return
    found = importlib.util.find_spec("nvidia_cutlass_dsl")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'nvidia_cutlass_dsl'", name="nvidia_cutlass_dsl")
    sys.path.append(str(Path(next(iter(found.submodule_search_locations))) / "dsl_packages"))


@contextmanager
def _instead_of_torch(gemm: QuackGemm) -> Iterator[None]:
    """Have ``grouped_gemm_vendor`` call quack, in autograd's threads too."""
    # Not ``megalora_kernels.grouped_gemm``: the package exports a function under the module's name.
    module: Any = importlib.import_module("megalora_kernels.grouped_gemm")
    torch_s = module._grouped_mm
    before = gemm.calls
    # A module's global, not a context variable: backward runs in threads of autograd.
    module._grouped_mm = gemm
    try:
        yield
    finally:
        module._grouped_mm = torch_s
    assert gemm.calls > before, "the arm never reached quack's GEMM"


def with_quack(arm: "Arm", tile: Tile) -> "Arm":
    """The same arm with quack's GEMM where it has torch's.

    Raises:
        ModuleNotFoundError: quack is not installed.
    """
    gemm = QuackGemm(tile)

    def forward() -> Tensor:
        with _instead_of_torch(gemm):
            return arm.forward()

    def train() -> dict[str, Tensor]:
        with _instead_of_torch(gemm):
            return arm.train()

    return replace(arm, kind="theirs", forward=forward, train=train)
