"""Read what the compiler made of a kernel: registers, spills, loops, copies, programs that share a
multiprocessor."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);", re.M
)
TENSOR_CORES = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
"""Kinds of tensor cores, and how PTX calls them: Hopper's, Blackwell's, those from Ampere on."""
PRODUCTS = ("HGMMA", "HMMA", "UTCHMMA")
"""Beginnings of the same instructions in the machine's code: Hopper's, Ampere's, Blackwell's."""


class Chip(NamedTuple):
    """Limits of one compute capability (CUDA C programming guide, technical specifications)."""

    program_shared: int
    """Bytes of shared memory that one program may have."""
    shared: int
    """Bytes of a multiprocessor, of which each program takes 1,024 more than it asks for."""
    warps: int
    products: str
    """Kind of tensor cores."""


CHIPS = {
    80: Chip(163 * 1024, 164 * 1024, 64, "mma"),
    89: Chip(99 * 1024, 100 * 1024, 48, "mma"),
    90: Chip(227 * 1024, 228 * 1024, 64, "wgmma"),
    100: Chip(227 * 1024, 228 * 1024, 64, "tcgen05"),
}
REGISTERS = 65_536
"""Of a multiprocessor; a warp takes them in steps of 256."""


def describe(kernel: Any, capability: int) -> dict[str, Any]:
    """Return what matters of a compiled kernel.

    ``loop`` are the instructions of the shortest loop with a product, or with an exponential where
    there is none; ``tma``, ``cp_async`` and ``loads`` are its copies by TMA, other copies into
    shared memory, and loads into registers.
    """
    cubin = kernel.asm["cubin"]
    ptx = kernel.asm["ptx"]
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", _cuobjdump(cubin, "-res-usage"))
    assert found, "cuobjdump says nothing about registers"
    # What does not fit into registers goes to the stack or to local memory: both are spills.
    registers, stack, local = map(int, found.groups())
    warps = kernel.metadata.num_warps
    loops = loops_of(_cuobjdump(cubin, "-sass"))
    loop = shortest(loops, PRODUCTS)
    activation = shortest(loops, ("MUFU.EX2",))
    # LDGSTS.E.BYPASS.128 and the like: the part before the first point says what is done.
    heads = Counter(op.split(".")[0] for op in loop)
    # exp(x) is 2^(x log2 e), and 2^ is one instruction.
    exponentials = sum(op.startswith("MUFU.EX2") for op in activation)
    per_sm = programs_per_multiprocessor(
        CHIPS[capability], registers, kernel.metadata.shared, warps
    )
    products = None
    for name, text in TENSOR_CORES.items():
        if text in ptx:
            products = name
            break
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": kernel.metadata.shared,
        "warps": warps,
        "per_sm": per_sm,
        "products": products,
        "loop": len(loop),
        "tma": heads["UTMALDG"],
        "cp_async": heads["LDGSTS"],
        "loads": heads["LDG"],
        "activation_loop": len(activation),
        "exponentials": exponentials,
    }


def programs_per_multiprocessor(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Return how many programs a multiprocessor holds at once."""
    # A warp takes registers for its 32 threads, each thread's number rounded up to 8.
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(chip.shared // (shared + 1024), by_registers, chip.warps // warps)


def loops_of(sass: str) -> list[list[str]]:
    """Return the instructions of every loop: what lies between a branch and the earlier address it
    goes to."""
    instructions: list[tuple[int, str, str]] = []
    for address, op, rest in INSTRUCTION.findall(sass):
        instructions.append((int(address, 16), op, rest))
    loops = []
    for end, op, rest in instructions:
        # "BRA 0x1f0": the only operand in hexadecimal is the address.
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target is None:
            continue
        start = int(target[1], 16)
        # Branches forward skip something; only those backward close a loop.
        if start < end:
            loops.append([other for at, other, _ in instructions if start <= at <= end])
    return loops


def shortest(loops: list[list[str]], heads: tuple[str, ...]) -> list[str]:
    """Return the shortest loop with an instruction that begins with one of ``heads``; empty if
    there is none."""
    # The shortest is the innermost: an outer loop contains its instructions and more.
    found: list[str] = []
    for loop in loops:
        has_head = any(op.startswith(heads) for op in loop)
        if has_head and (not found or len(loop) < len(found)):
            found = loop
    return found


def _cuobjdump(cubin: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [CUOBJDUMP, *flags, file.name], capture_output=True, text=True, check=True
        ).stdout
