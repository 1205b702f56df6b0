"""Cross entropy over target tokens, as a sum and a count.

The mean is taken once, over the target tokens of the whole global batch, when gradients are
finalised; a mean per microbatch or per rank would weigh tokens by how samples happen to be spread.
"""

import torch
from torch import Tensor


def loss_sum(
    token_losses_BS: Tensor, loss_mask_BS: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of losses, number of target tokens, the two as one report) in the form Megatron's
    schedules take."""
    # In float32: a bfloat16 sum of thousands of losses would round at every addition.
    total = (token_losses_BS.float() * loss_mask_BS).sum()
    count = loss_mask_BS.sum().to(torch.int)
    return total, count, {"sum_and_count": torch.stack([total.detach().double(), count.double()])}


def token_losses(
    token_losses_BS: Tensor, loss_mask_BS: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As ``loss_sum``, but the report is the loss of every token."""
    total, count, _ = loss_sum(token_losses_BS, loss_mask_BS)
    return total, count, {"token_losses": token_losses_BS.float()}
