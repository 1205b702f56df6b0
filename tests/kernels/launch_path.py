"""Launch kernels into a CUDA driver that is not there: everything between a call and the GPU.

    python -m tests.kernels.launch_path [--every]

Triton's launcher is the real one: it specialises arguments, parses them in C, makes TMA descriptors
and calls the driver. That driver is ``stub_cuda.c``, built here: it checks what the documentation
demands of a launch and of a descriptor, and runs nothing, so outputs mean nothing. Prints one line
of JSON. Needs a C compiler, as Triton does.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

STUB = Path(__file__).with_name("stub_cuda.c")


def install_stub(folder: Path) -> ctypes.CDLL:
    """Build the driver and have Triton's libraries find it; before Triton is imported."""
    library = folder / "libcuda.so.1"
    command = [
        "cc",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        str(library),
        str(STUB),
    ]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    # dlopen finds it by its name from now on
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.stub_launches.restype = stub.stub_descriptors.restype = ctypes.c_long
    return stub


def install_driver() -> None:
    """Triton's driver for CUDA, asking nobody which device there is."""
    from megalora_kernels import backend
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class Hopper(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            # Asked of libcuda and torch.cuda otherwise, at every launch.
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda _device: 0
            self.get_device_capability = lambda *_: (9, 0)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Hopper())  # pyright: ignore
    backend.INTERPRETED = True  # CPU tensors are all there is


def launches(every: bool) -> Iterator[tuple[str, Any]]:
    """(what it is, a call) for grouped GEMMs of Qwen3-30B-A3B with adapters: two of them, or all
    that there are."""
    import torch
    from megalora_kernels.variants import candidates, problem

    from benchmarks.expert_case import SIZES
    from benchmarks.tune_points import gemms_of, launch, make_operands, variant_label

    # 16 experts with 64 rows each; operands are never filled, since nothing reads them.
    for gemm in gemms_of(SIZES["30b"]):
        product = gemm.product(torch.bfloat16, 512)
        operands = make_operands(gemm, [64] * 16, torch.device("cpu"), torch.bfloat16, filled=False)
        found = candidates(product)
        if not every:  # two blocks of b and gathered rows; both operands by descriptor
            small = replace(
                found[0], block_m=64, block_n=64, num_warps=4, num_stages=2, weight="tma"
            )
            rows = "pointers" if product.gathered else "tma"
            found = [replace(small, rows=rows)] if gemm.name.split()[1] == "gate_up" else []
        for variant in found:
            assert problem(variant, product) is None
            yield (
                f"{gemm.name}: {variant_label(variant)}",
                # Defaults hold this turn's values; a closure would see the loop's last.
                lambda o=operands, v=variant: launch(o, v),
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Launch kernels into a CUDA driver that is not there."
    )
    parser.add_argument(
        "--every", action="store_true", help="all variants of all products: minutes, not seconds"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stub = install_stub(Path(folder))
        install_driver()
        import triton

        rows = []
        for name, call in launches(options.every):
            # The driver counts from its start; a row has the difference.
            launches_before = stub.stub_launches()
            descriptors_before = stub.stub_descriptors()
            row: dict[str, Any] = {"what": name, "problem": None}
            try:
                call()
            except Exception as error:  # one that cannot be launched is what this looks for
                row["problem"] = f"{type(error).__name__}: {error}"[:300]
            row["launches"] = stub.stub_launches() - launches_before
            row["descriptors"] = stub.stub_descriptors() - descriptors_before
            rows.append(row)
        print(json.dumps({"triton": triton.__version__, "rows": rows}))
    sys.exit(any(row["problem"] for row in rows))


if __name__ == "__main__":
    main()
