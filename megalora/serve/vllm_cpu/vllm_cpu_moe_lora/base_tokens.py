"""Compute tokens of the base model without an adapter, on vLLM's CPU build.

vLLM 0.32 gives them the adapter in the last slot there (vLLM pull request 48421).

A token's slot is -1 where its request names no adapter. The torch operators index the stacked
weights with it, and -1 is the last: a base request in one batch with an adapter's is answered by
another model, off by 0.6 to 1 in log-probability in our tests. Triton's operators leave such tokens
out, as these do from here on.
"""

from __future__ import annotations

import functools

OPERATORS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
"""Operators to wrap; all others call these."""


def install() -> None:
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in OPERATORS:
        careful = leaving_out_base_tokens(getattr(lora_ops, name))
        # The latter two have imported the operators under names of their own.
        for module in (lora_ops, torch_ops, punica_cpu):
            setattr(module, name, careful)


def leaving_out_base_tokens(operator):
    """``operator(inputs, weights, output, slots, ...)`` on the rows whose slot is not negative;
    ``output``'s others stay."""

    @functools.wraps(operator)
    def careful(inputs, weights, output, slots, *args, **kwargs) -> None:
        adapted = slots >= 0
        if adapted.all():
            operator(inputs, weights, output, slots, *args, **kwargs)
        elif slots.numel() == inputs.shape[0]:
            rows = adapted.nonzero(as_tuple=True)[0]
            # Indexing copies, so that the result has to be written back.
            part = output[rows]
            operator(inputs[rows], weights, part, slots[rows], *args, **kwargs)
            output[rows] = part
        # One slot may stand for all rows; here it is -1, and there is nothing to do.
        elif slots.numel() > 1:
            raise RuntimeError(
                f"{inputs.shape[0]} tokens, but vLLM named adapters for {slots.numel()}"
            )

    return careful
