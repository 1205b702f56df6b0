"""Cross entropy over target tokens, as a sum and a count.

The mean is taken once, over the target tokens of the whole global batch, when gradients are
finalised; a mean per microbatch or per rank would weigh tokens by how samples happen to be spread.
"""

import torch
from torch import Tensor


def loss_sum(losses_1T: Tensor, loss_mask_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of losses, number of target tokens, the two as one report) in the form Megatron's
    schedules take."""
    # In float32: a bfloat16 sum of thousands of losses would round at every addition.
    total = (losses_1T[0].float() * loss_mask_T).sum()
    count = loss_mask_T.sum().to(torch.int)
    return total, count, {"sum_and_count": torch.stack([total.detach().double(), count.double()])}


def token_losses(
    losses_1T: Tensor, loss_mask_T: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As ``loss_sum``, but the report is the loss of every token."""
    total, count, _ = loss_sum(losses_1T, loss_mask_T)
    return total, count, {"token_losses": losses_1T[0].float()}
