"""Describe operands of the grouped GEMM for TMA, the copy engine of Hopper and later.

Descriptors are made on the host, so they need no workspace on the device. A stack of matrices, one
for each expert, is described as one matrix in which an expert begins every ``pitch`` rows.

Shape legend: E experts   K inputs   N outputs
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGN_BYTES = 16
"""What the start of a matrix and the distance between its rows must be multiples of."""


def rows_descriptor(x: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Return the descriptor of a matrix, read by blocks; zeros beyond its edges."""
    return TensorDescriptor.from_tensor(x, list(block))


def stack_descriptor(
    w_EKN: torch.Tensor, block_k: int, block_n: int
) -> tuple[TensorDescriptor, int]:
    """Return the descriptor of the experts' matrices, and the rows from one expert to the next.

    Stored ``[E, N, K]`` they are read by blocks of N and K; stored ``[E, K, N]``, by blocks of K
    and N.
    """
    w = w_EKN
    block = [block_k, block_n]
    if by_columns(w_EKN):
        w = w_EKN.transpose(1, 2)
        block = [block_n, block_k]
    num_experts, num_rows, num_columns = w.shape
    # In rows, not elements: N where experts lie side by side, N + R with room for an adapter.
    pitch = w.stride(0) // w.stride(1)
    # Of the last expert only its own rows: what lies behind them in a wider buffer need not exist.
    shape = [(num_experts - 1) * pitch + num_rows, num_columns]
    return TensorDescriptor(w, shape, [w.stride(1), 1], block), pitch


@triton.jit
def load_from_stack(desc, first_row, k0, n0, BY_COLUMNS: tl.constexpr):
    """A block (K, N) of the expert that begins at ``first_row``, from ``k0`` and ``n0`` on."""
    if BY_COLUMNS:
        # Stored [N, K]: the block arrives as (N, K) and is read transposed, without a copy.
        return desc.load([first_row + n0, k0]).T
    else:
        return desc.load([first_row + k0, n0])


def by_columns(w_EKN: torch.Tensor) -> bool:
    """Whether the matrices are stored ``[E, N, K]``."""
    return w_EKN.stride(1) == 1


def why_not_described(name: str, t: torch.Tensor) -> str | None:
    """Return why TMA cannot read a matrix or a stack of them, or None."""
    if t.dim() == 3 and by_columns(t):
        t = t.transpose(1, 2)
    # Bytes from one row to the next, and before it from one expert to the next.
    steps = [step * t.element_size() for step in t.stride()[:-1]]
    misaligned = any(step % ALIGN_BYTES for step in steps) or t.data_ptr() % ALIGN_BYTES
    if t.stride(-1) != 1 or misaligned:
        return (
            f"TMA needs rows that start at multiples of {ALIGN_BYTES} bytes: {name} has strides"
            f" {t.stride()} of {t.element_size()} bytes and starts {t.data_ptr() % ALIGN_BYTES}"
            " bytes beside one"
        )
    # An expanded gradient has all its rows in one place.
    if steps[-1] < t.shape[-1] * t.element_size():
        return (
            f"TMA needs rows that do not overlap: {name} has strides {t.stride()} and {t.shape[-1]}"
            " columns"
        )
    if t.dim() == 3 and steps[0] % steps[1]:
        return f"TMA needs experts a whole number of rows apart: {name} has strides {t.stride()}"
    return None
