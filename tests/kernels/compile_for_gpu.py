"""Compiles every Triton kernel for a GPU that is not there, and prints what each needs.

    python -m tests.kernels.compile_for_gpu [90]

Triton carries its own assembler, so types, shapes, shared memory, registers and spills are known before a GPU is. The
launchers run on CPU tensors with a driver that names a target and with launches cut off behind the compiler.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from megalora_kernels import Adapter, Routing, backend, expert_mlp, permute_shrink, route
from megalora_kernels.regroup import regroup_triton
from megalora_kernels.route import route_triton, spread_triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What one program may have, by compute capability (CUDA C programming guide, table of technical specifications)."""
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NamedTarget:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@cache
def resources(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of local memory: spills)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


def compile_all(capability: int) -> list[dict[str, Any]]:
    """One row per compiled kernel: name, dtype, rank, shared bytes, registers, spilled bytes."""
    rows: list[dict[str, Any]] = []
    case: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        registers, spilled = resources(kernel.asm["cubin"])
        tile = {name: kwargs.get(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_stages")}
        rows.append({"kernel": self.__name__, **case, **tile, "shared": kernel.metadata.shared, "registers": registers,
                     "spilled": spilled, "warps": kernel.metadata.num_warps, "wgmma": kernel.asm["ptx"].count("wgmma.mma_async")})  # fmt: skip
        return kernel

    driver.set_active(NamedTarget(capability))  # pyright: ignore
    JITFunction.run = compile_only  # pyright: ignore
    backend.INTERPRETED = True  # CPU tensors are all there is
    cases = [(torch.bfloat16, 16, 64), (torch.bfloat16, 16, 2048), (torch.bfloat16, 64, 2048), (torch.float32, 16, 64)]
    for dtype, rank, tokens in cases:
        case.update(dtype=str(dtype).removeprefix("torch."), rank=rank, rows_per_expert=tokens)
        _qwen3_layer(dtype, rank, tokens)
        if rank == 16 and tokens == 64:
            _qwen3_routing(dtype)
    return rows


def _qwen3_layer(dtype: torch.dtype, rank: int, tokens: int) -> None:
    """Forward and backward of two experts of Qwen3-30B-A3B; values mean nothing."""
    E, H, I = 2, 2048, 768
    new = {"dtype": dtype, "requires_grad": True}
    x, p = torch.zeros(tokens, H, **new), torch.zeros(tokens * E, requires_grad=True)
    a1, b1 = torch.zeros(E, 2 * rank, H, **new), [torch.zeros(E, I, rank, **new) for _ in range(2)]
    a2, b2 = torch.zeros(E, rank, I, **new), torch.zeros(E, H, rank, **new)
    w1, w2 = torch.zeros(E, 2 * I, H, dtype=dtype), torch.zeros(E, H, I, dtype=dtype)
    routing, _ = route(torch.ones(tokens, E, dtype=torch.bool), E)
    adapters = {"gate_up": Adapter(a1, tuple(b1), (2.0, 2.0)), "down": Adapter(a2, (b2,), (2.0,))}
    for kept in ({}, adapters):
        expert_mlp(x, w1, w2, p, routing, backend="triton", **kept).sum().backward()
    sorted_rows = Routing(routing.offsets_E, routing.num_rows)
    y = expert_mlp(torch.zeros(tokens * E, H, **new), w1, w2, p, sorted_rows, backend="triton", **adapters)
    y.sum().backward()
    sum(t.sum() for t in permute_shrink(x, a1, routing, backend="triton")).backward()  # pyright: ignore


def _qwen3_routing(dtype: torch.dtype) -> None:
    """Routing of 128 experts, top 8, and of what 8 ranks send for 16 of them."""
    routing, expert_TK, moved_M = route_triton(
        torch.zeros(64, 128, dtype=torch.bool), 8, torch.zeros(64, 128, dtype=dtype)
    )
    assert routing.slots_TK is not None and moved_M is not None
    spread_triton(moved_M, routing.slots_TK, expert_TK, 128)
    regroup_triton(torch.zeros(8, 16, dtype=torch.int64), 512, moved_M)


def main() -> None:
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    rows = compile_all(capability)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
