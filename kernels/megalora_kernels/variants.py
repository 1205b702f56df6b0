"""Variants of the Triton grouped GEMM: tile, way of operands, walk of programs over tiles.

All variants add the terms of K in the same order, BLOCK_K at a time, and the adapter's product
after them: which one runs changes the time and not what is computed. ``rule`` names one for every
product; ``tuned.py`` has the better one where a GPU was measured.

Shape legend: M routed rows   E experts   K inputs   N outputs   R rank
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

Operand = Literal["pointers", "tma"]
"""How an operand is read: by an address for each element (``cp.async``), or by tensor descriptor
(TMA, Hopper and later)."""


@dataclass(frozen=True)
class Product:
    """One grouped product ``x [M, K] @ w [E, K, N]``, as far as the choice of a variant depends on
    it."""

    op: Literal["forward", "dgrad"]
    """``forward``: the weight is stored ``[E, N, K]``; ``dgrad``: ``[E, K, N]``. N and K are those
    of the product."""
    dtype: torch.dtype
    N: int
    K: int
    rank: int
    """R: columns of the adapter's product; 0 without one."""
    gathered: bool
    """Rows of x are taken through ``source_M`` and cannot be read by TMA on Hopper."""
    rows_per_expert: float
    """M / E: the mean, which the host knows; not the counts."""
    blocks: int = 1
    """Into how many blocks of equal width N is divided, each with its own adapter: 2 for gate and
    up."""


@dataclass(frozen=True)
class Variant:
    """How one grouped GEMM is computed."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    weight: Operand = "pointers"
    rows: Operand = "pointers"
    persistent: bool = False
    """One program for each multiprocessor walks over the tiles, instead of one program for each
    tile."""


# ---- what can run --------------------------------------------------------------------------------

SHARED_LIMITS = {
    (8, 0): 163,
    (8, 7): 163,
    (9, 0): 227,
    (10, 0): 227,
    (10, 1): 227,
    (10, 3): 227,
    (11, 0): 227,
}
"""KiB of shared memory that one program may have, by compute capability (CUDA C programming guide);
99 on the others."""
HOPPER = (9, 0)
HOPPER_SHARED = SHARED_LIMITS[HOPPER] * 1024
MAX_ACCUMULATORS = 128
MAX_ACCUMULATORS_BEFORE_HOPPER = 64
"""Float32 values of the accumulator that a thread can hold beside its addresses, of 255 registers.
Before Hopper the operands of a product take registers too: 128 sums made 16 to 120 bytes of them
spill (compiled)."""
MIN_SIDE = 16
MAX_WARPS = 32
"""The least that Triton multiplies along each side of a tile, and the most warps that a program
has."""
MAX_PERSISTENT_RANK = 64
"""Above it a persistent program spills up to 104 bytes (compiled)."""


def shared_limit_of(capability: tuple[int, int]) -> int:
    """Return the bytes of shared memory that one program may have."""
    return SHARED_LIMITS.get(capability, 99) * 1024


@cache
def device_limits(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Return the bytes of shared memory for a program, and the compute capability; Hopper's for the
    interpreter."""
    capability = HOPPER if device.type == "cpu" else torch.cuda.get_device_capability(device)
    return shared_limit_of(capability), capability


def shared_bytes(variant: Variant, product: Product) -> int:
    """Return the bytes of shared memory that the variant takes: an upper bound, within 128 bytes
    for Hopper.

    The loop over K has ``num_stages`` buffers for tiles of x and w. The adapter's operands come
    after the loop and reuse them; so does the conversion of the output.
    """
    per_k = (variant.block_m + variant.block_n) * product.dtype.itemsize
    pipeline = per_k * variant.num_stages * variant.block_k
    low_rank = per_k * tile_rank(product.rank)
    barriers = 128  # what TMA waits on
    return max(pipeline, low_rank) + barriers


def _is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


def tile_rank(rank: int) -> int:
    """Return the rank that a tile has: a power of two from 16 on, 0 without adapter."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0


def problem(
    variant: Variant,
    product: Product,
    shared_limit: int = HOPPER_SHARED,
    capability: tuple[int, int] = HOPPER,
) -> str | None:
    """Return why the variant cannot compute this product, or None.

    Addresses and strides are not part of a product: ``gemm_kernel.tma_problem`` looks at those.

    Args:
        shared_limit: bytes of shared memory that one program may have on the device.
        capability: the device's compute capability.
    """
    sides = (variant.block_m, variant.block_n, variant.block_k)
    if any(side < MIN_SIDE or not _is_power_of_two(side) for side in sides):
        return (
            f"a tile's sides are powers of two from {MIN_SIDE} on, not"
            f" {' x '.join(map(str, sides))}"
        )
    if variant.num_warps > MAX_WARPS or not _is_power_of_two(variant.num_warps):
        return (
            f"a program has a power of two of warps, at most {MAX_WARPS}, not {variant.num_warps}"
        )
    shared = shared_bytes(variant, product)
    if shared > shared_limit:
        return (
            f"it needs {shared} bytes of shared memory, the device has {shared_limit} for a program"
        )
    accumulators = variant.block_m * variant.block_n // (32 * variant.num_warps)
    most = MAX_ACCUMULATORS if capability >= HOPPER else MAX_ACCUMULATORS_BEFORE_HOPPER
    if accumulators > most:
        return (
            f"{variant.num_warps} warps would hold {accumulators} sums per thread, at most"
            f" {most} fit"
        )
    if "tma" in (variant.weight, variant.rows):
        return _tma_problem(variant, product, capability)
    return None


def _tma_problem(variant: Variant, product: Product, capability: tuple[int, int]) -> str | None:
    width = product.N // product.blocks
    if capability < HOPPER:
        return f"TMA needs compute capability 9.0, the device has {capability[0]}.{capability[1]}"
    if product.K % variant.block_k:
        return f"TMA needs whole tiles: K={product.K} is not a multiple of {variant.block_k}"
    if width % variant.block_n:
        return f"TMA needs whole tiles: {width} columns are not a multiple of {variant.block_n}"
    if variant.rows == "tma" and product.gathered:
        return "rows that are gathered cannot be read by TMA"
    return None


# ---- which one to take ---------------------------------------------------------------------------

WIDE_TILE_ROWS = 96
"""Rows per expert from which 128 x 256 beats 64 x 128: predicted, and in SGLang's tuned table for
H100."""
SQUARE_TILE_ROWS = 384
"""Where columns do not divide by 256: 128 rows waste a quarter of the work at 512 rows per expert,
64 an eighth."""
PERSISTENT_ROWS = 512
"""Rows per expert from which a persistent program takes the gathered dgrad, on Hopper: measured on
an H100, 1.03 to 1.35 times as fast with 512 to 8,192 rows (30B and 235B shapes, rank 16 twice)."""


def rule(
    product: Product, shared_limit: int = HOPPER_SHARED, capability: tuple[int, int] = HOPPER
) -> Variant:
    """Return a variant that can run everywhere: operands by pointers. Predicted, and where a
    persistent program is taken measured.

    Per FLOP a 128 x 256 tile reads the least from shared memory and from L2. Where it does not fit
    (before Hopper) a smaller tile or fewer stages are taken.
    """
    if product.dtype == torch.float32:  # no tensor cores in full precision
        return Variant(32, 64, 32, num_warps=4, num_stages=2)
    preferred: list[Variant] = []
    if (product.N // product.blocks) % 256 == 0 and product.rows_per_expert >= WIDE_TILE_ROWS:
        walks = capability >= HOPPER and product.rows_per_expert >= PERSISTENT_ROWS
        # Forward was fastest with weights by TMA, which not every address allows: it has the table.
        walks = walks and product.op == "dgrad" and product.gathered
        walks = walks and product.rank <= MAX_PERSISTENT_RANK
        preferred.append(Variant(128, 256, 64, 8, 4, persistent=walks))
    if product.rows_per_expert >= SQUARE_TILE_ROWS:
        preferred += [Variant(128, 128, 64, 8, stages) for stages in (4, 3)]
    preferred += [Variant(64, 128, 64, 4, stages) for stages in (4, 3, 2)]
    return next(v for v in preferred if problem(v, product, shared_limit, capability) is None)


TILES = ((64, 128, 4), (64, 256, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8))
"""Rows, columns and warps worth trying in half precision; 64 terms of K at a time."""


def candidates(
    product: Product, shared_limit: int = HOPPER_SHARED, capability: tuple[int, int] = HOPPER
) -> list[Variant]:
    """Return every variant worth measuring for this product, the rule's first."""
    found = [rule(product, shared_limit, capability)]
    if product.dtype == torch.float32:
        return found
    operands: list[tuple[Operand, Operand]] = [("pointers", "pointers"), ("tma", "pointers")]
    if not product.gathered:
        operands[1] = ("tma", "tma")
    for block_m, block_n, num_warps in TILES:
        for num_stages in (3, 4):
            for weight, rows in operands:
                for persistent in (False, True):
                    # Walking costs 35 to 70 registers: at smaller tiles a multiprocessor then holds
                    # one program, not two.
                    if persistent and (
                        (block_m, block_n) != (128, 256) or product.rank > MAX_PERSISTENT_RANK
                    ):
                        continue
                    found.append(
                        Variant(
                            block_m, block_n, 64, num_warps, num_stages, weight, rows, persistent
                        )
                    )
    unique = dict.fromkeys(found)
    return [v for v in unique if problem(v, product, shared_limit, capability) is None]
