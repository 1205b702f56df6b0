"""Codes and scales of one frozen weight on a rank, as a module: no cast changes them, and moving
the model moves them.

    buffer       dtype   shape                                   split
    codes        uint8   ``QuantisedWeight.codes``               as the weight
    scale_bits   int32   that of ``QuantisedWeight.scales``      as the weight

A float32 buffer would be rounded by ``module.bfloat16()``, and by Megatron's Float16Module: the
bits of scales are kept as integers.
"""

from typing import Any

import torch
from megalora_kernels import CodedWeight, QuantisedWeight, Scratch, block_bytes
from torch import Tensor, nn


class HeldCodes(nn.Module):
    """One weight ``[E, N, K]`` of a rank; E is 1 for a dense linear."""

    codes: Tensor
    scale_bits: Tensor

    def __init__(
        self,
        how: Any,
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``how``: a ``Coded``; ``dtype``: of decoded values."""
        super().__init__()
        self.how = how
        self.sizes = sizes
        self.dtype = dtype
        experts, n, k = sizes
        p, q = how.grain
        # A code of fp8 is a byte, one of nf4 half a byte; blocks of odd q end in a whole one.
        width = k if how.form == "fp8" else k // q * block_bytes(q)
        codes = torch.empty(experts, n, width, dtype=torch.uint8, device=device)
        scales = torch.empty(experts, n // p, k // q, dtype=torch.int32, device=device)
        # Not persistent: nothing but ``held_loading.py`` fills them.
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale_bits", scales, persistent=False)
        self.scratch: Scratch = how.scratch or Scratch()
        # Not at the first decode: by then the largest weight that shares the memory has asked.
        self.scratch.reserve(how.scratch_elements(sizes), dtype, device)

    @property
    def scales(self) -> Tensor:
        """float32, in the same memory as their bits."""
        return self.scale_bits.view(torch.float32)

    @property
    def quantised(self) -> QuantisedWeight:
        """Codes and scales as the kernels read them."""
        return QuantisedWeight(self.how.form, self.codes, self.scales, self.how.grain)

    def operand(self) -> CodedWeight:
        """The weight as the expert kernels take it."""
        # The module is the owner, since ``quantised`` is another object at every call.
        return CodedWeight(self.quantised, self.how.rank, self.dtype, self.scratch, self)

    def decoded(self) -> Tensor:
        """``[E, N, K]`` in the shared memory: valid until another weight is decoded."""
        return self.operand().weight

    def own_copy(self, expert: int) -> Tensor:
        """``[N, K]`` of one expert, in memory of its own."""
        # All experts at once would take the memory of the layer in the compute dtype.
        return self.quantised.experts(expert, expert + 1).dequantised(self.dtype)[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scale_bits.nbytes

    def mark_unwritten(self) -> None:
        """Let every scale be NaN, so that ``problem`` sees what loading leaves out."""
        # Codes cannot be marked: all 256 bytes are codes of nf4.
        self.scales.fill_(torch.nan)
        # The scratch knows whose values it has, and not that their codes are about to change.
        self.scratch.forget()

    def problem(self) -> str | None:
        """What is wrong with the values after loading, in words; None if nothing is."""
        if self.scales.isnan().any():
            return "scales were not written, or are NaN"
        # e4m3fn has two codes that are NaN.
        if self.how.form == "fp8" and ((self.codes & 127) == 127).any():
            return "codes are NaN"
        return None
