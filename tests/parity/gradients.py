"""The gradient an optimizer step would use, whole, under HF names: reduced over every group,
gathered over every split."""

from typing import Any

import torch
from torch import Tensor

from megalora.comm import sum_bucket
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.gather import gather_tensors


def reduced_gradients(model: AdaptedModel, optimizer: Any) -> dict[str, Tensor] | None:
    """Float32 gradients of all adapter tensors on rank 0, None elsewhere; collective. Call between
    backward and step.

    After the reduction a data-parallel rank holds valid sums only in the slice of the buffer that
    its optimizer owns; the slices are read through the optimizer and put together by adding zeros.
    """
    gradients = {}
    # Zeros outside the slice, so that a sum over ranks puts the slices together.
    for shard in model.trained:
        p = shard.parameter
        gradients[p] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
    for part in optimizer.chained_optimizers:
        for parameter in getattr(part, "model_param_group_index_map", ()):
            # The range of the flattened parameter that this rank's optimizer steps.
            owned = part._get_model_param_range_map(parameter)["param"]
            mine = slice(owned.start, owned.end)
            gradients[parameter].view(-1)[mine] = parameter.main_grad.reshape(-1)[mine]
    # Megatron marks experts' parameters with ``allreduce = False``: their replicas are over edp.
    for group, allreduce in ((model.groups.dp_cp, True), (model.groups.edp, False)):
        of_group = []
        for p, gradient in gradients.items():
            if p.allreduce is allreduce:  # type: ignore
                of_group.append(gradient)
        sum_bucket(of_group, group)
    return gather_tensors(model.trained, gradients, model.groups)
