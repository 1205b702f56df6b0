"""Codes and scales of one frozen weight on a rank, as a module: no cast changes them, and moving
the model moves them.

    buffer       dtype   shape                                   split
    codes        uint8   ``QuantisedWeight.codes``               as the weight
    scale_bits   int32   that of ``QuantisedWeight.scales``      as the weight

Where scales are codes themselves:

    scale_codes  uint8   that of ``QuantisedWeight.scales``      as the weight
    scale_bits   int32   ``Nested``: values, scales and offsets, one behind the other

A float32 buffer would be rounded by ``module.bfloat16()``, and by Megatron's Float16Module: the
bits of scales are kept as integers.
"""

from typing import Any

import torch
from megalora_kernels import CodedWeight, Nested, QuantisedWeight, Scratch
from torch import Tensor, nn


class HeldCodes(nn.Module):
    """One weight ``[E, N, K]`` of a rank; E is 1 for a dense linear."""

    codes: Tensor
    scale_bits: Tensor
    scale_codes: Tensor

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
        codes = torch.empty(experts, n, how.width(k), dtype=torch.uint8, device=device)
        of_scales = (experts, n // p, k // q)
        if how.double is None:
            scales = torch.empty(of_scales, dtype=torch.int32, device=device)
        else:
            scale_codes = torch.empty(of_scales, dtype=torch.uint8, device=device)
            self.register_buffer("scale_codes", scale_codes, persistent=False)
            floats = how.double.num_floats(experts, n, k // q)
            scales = torch.empty(floats, dtype=torch.int32, device=device)
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
    def nested(self) -> Nested:
        """What the codes of scales mean, in the same memory."""
        double = self.how.double
        experts, n, k = self.sizes
        sizes = (n // double.rows, k // self.how.grain[1] // double.scales)
        num_second = experts * sizes[0] * sizes[1]
        num_offsets = experts * n // double.run
        num_values = self.scales.numel() - num_second - num_offsets
        values, second, offsets = self.scales.split((num_values, num_second, num_offsets))
        return Nested(values, second.view(experts, *sizes), offsets.view(experts, -1))

    @property
    def quantised(self) -> QuantisedWeight:
        """Codes and scales as the kernels read them."""
        form, grain = self.how.form, self.how.grain
        if self.how.double is None:
            return QuantisedWeight(form, self.codes, self.scales, grain)
        return QuantisedWeight(form, self.codes, self.scale_codes, grain, self.nested)

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
        return sum(buffer.nbytes for buffer in self.buffers())

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
