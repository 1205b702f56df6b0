"""Compute loss and adapter gradients with stock transformers and stock PEFT, by the names and
shapes of the adapter's own file.

PEFT fuses what a file holds per expert: A of gate and up stacked per expert, B block-diagonal, all
experts in one matrix. Its gradients are cut apart again here; the blocks off the diagonal are zeros
that belong to no tensor of the file.
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight")
PART = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip
"""Name of an expert's linear in a file -> what it computes; the second row is Mixtral's."""


class PeftOracle:
    """A base model and an adapter folder, or several that act together, each under its own name;
    every sample runs alone and unpadded, in float64."""

    def __init__(self, base: Path, *folders: Path) -> None:
        # "eager" computes expert after expert, without the limits that grouped products set to
        # dtypes and alignment.
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float64, experts_implementation="eager"
        )
        # PEFT makes factors in float32, whatever the base's dtype; eval() turns dropout off.
        peft: Any = None
        self.shapes = {}
        for folder in folders:
            how = {"adapter_name": folder.name, "is_trainable": True}
            if peft is None:
                peft = PeftModel.from_pretrained(model, str(folder), **how)
            else:
                peft.load_adapter(str(folder), **how)
            with safe_open(folder / "adapter_model.safetensors", "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self.shapes[name] = file.get_slice(name).get_shape(), folder.name
        peft.base_model.set_adapter([folder.name for folder in folders])
        self.model = peft.double().eval()

    def loss(self, samples: list) -> Tensor:
        """Mean over the target tokens of all samples."""
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for sample in samples:
            ids = torch.tensor(sample.input_ids).long()
            mask = torch.tensor(sample.loss_mask)
            # Position i predicts token i + 1, and counts where that token is a target.
            logits = self.model(ids[None, :-1]).logits[0]
            total = total + (F.cross_entropy(logits, ids[1:], reduction="none") * mask[1:]).sum()
            count += int(mask[1:].sum())
        return total / count

    def gradients(self, samples: list) -> tuple[float, dict[str, Tensor]]:
        """(loss, gradient of every tensor in the adapter's file)."""
        loss = self.loss(samples)
        loss.backward()
        # Only adapters want gradients; the base was frozen by PEFT.
        trained = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                trained[name] = parameter.grad
        found = {}
        for name, (shape, folder) in self.shapes.items():
            found[name] = self._of_tensor(name, shape, trained, folder)
        return loss.item(), found

    def _of_tensor(
        self, name: str, shape: list[int], trained: dict[str, Tensor], adapter: str
    ) -> Tensor:
        # transformers renames Mixtral's modules on loading
        name = name.replace(".block_sparse_moe.", ".mlp.")
        if match := EXPERT.fullmatch(name):
            experts = match[1]
            expert = int(match[2])
            projection = PART[match[3]]
            factor = match[4]
            # PEFT wraps gate_up first, then down around it
            inner = "" if projection == "down" else ".base_layer"
            fused = trained.get(f"{experts}{inner}.lora_{factor}.{adapter}.weight")
            if fused is None:  # one of the two was not adapted, so nothing is wrapped twice
                fused = trained[f"{experts}.lora_{factor}.{adapter}.weight"]
            return _of_expert(fused, expert, projection, factor, shape)
        if name.endswith(".lora_B.bias"):
            return trained[f"{name.removesuffix('.bias')}.{adapter}.bias"]
        # A bias of the base itself, under its own name.
        if name.endswith(".bias"):
            return trained[name]
        stem = name.removesuffix(".weight")
        if name.endswith(".trainable_tokens_delta"):
            return trained[f"{name}.{adapter}"]
        if ".lora_" not in name:
            saved = trained.get(f"{stem}.modules_to_save.{adapter}.weight")
            # A head that is tied to the embedding is one parameter with it.
            tied = "base_model.model.model.embed_tokens"
            return trained[f"{tied}.modules_to_save.{adapter}.weight"] if saved is None else saved
        stem, factor = name.removesuffix(".weight").rsplit(".", 1)
        return trained[f"{stem}.{factor}.{adapter}.weight"]


def _of_expert(
    fused: Tensor, expert: int, projection: str, factor: str, shape: list[int]
) -> Tensor:
    """``fused``: A ``[experts * r, in]``, B ``[out, r * experts]`` with the expert running fastest;
    r is twice for gate_up."""
    # Of gate_up the first r ranks are gate's, the next r up's.
    rank = shape[0] if factor == "A" else shape[1]
    both = 1 if projection == "down" else 2
    first = rank if projection == "up" else 0
    # A is [E * both * r, in]: an expert's ranks are neighbours.
    if factor == "A":
        return fused.unflatten(0, (-1, both * rank))[expert, first : first + rank]
    # B is [out, both * r * E]: neighbours are the same rank of two experts.
    of_expert = fused.unflatten(1, (both * rank, -1))[:, first : first + rank, expert]
    # Rows of gate_up's output are gate's, then up's.
    return of_expert[shape[0] :] if projection == "up" else of_expert[: shape[0]]
