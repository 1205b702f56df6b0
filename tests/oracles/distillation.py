"""The distance from a teacher, in float64 and sample by sample."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from tests.oracles.training import Oracle


def distill_loss(
    oracle: Oracle,
    samples: list,
    kind: str,
    beta: float | None,
    temperature: float,
    sft_weight: float,
) -> Tensor:
    """Mean over the target tokens of the distance from the teacher, times T^2, and of the cross
    entropy (Hinton et al. 2015; Agarwal et al. 2024)."""
    merged = oracle.merged()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for sample in samples:
        ids = torch.tensor(sample.input_ids).long()
        mask = torch.tensor(sample.loss_mask)[1:]
        row = ids[None, :-1]
        output = functional_call(oracle.model, merged, (row,), tie_weights=False)
        logits = output.logits[0].double()[mask]
        with torch.no_grad():
            taught = oracle.teacher(row).logits[0].double()[mask]
        q = (logits / temperature).softmax(-1)
        p = (taught / temperature).softmax(-1)
        if kind == "forward":
            distance = F.kl_div(q.log(), p, reduction="sum")
        elif kind == "reverse":
            distance = F.kl_div(p.log(), q, reduction="sum")
        else:
            assert beta is not None
            m = (beta * p + (1 - beta) * q).log()
            distance = beta * F.kl_div(m, p, reduction="sum")
            distance = distance + (1 - beta) * F.kl_div(m, q, reduction="sum")
        learned = F.cross_entropy(logits, ids[1:][mask], reduction="sum")
        total = total + temperature**2 * distance + sft_weight * learned
        count = count + int(mask.sum())
    return total / count
