"""Compute one Qwen mixture-of-experts layer with LoRA in the plainest way: loops, no fusion, no
parallelism, float64.

Names are those of the checkpoint below ``mlp.``: ``gate.weight``, ``experts.3.up_proj.weight``,
``shared_expert.down_proj.weight``; factors end in ``.lora_A.weight`` and ``.lora_B.weight``.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


class MoELayer:
    """The layer with its frozen weights and with factors that want gradients."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        factors: Mapping[str, Tensor],
        scale: float,
        top_k: int,
        normalise: bool,
    ) -> None:
        """``normalise``: whether the chosen probabilities are divided by their sum."""
        self.weights = {name: t.double() for name, t in weights.items()}
        self.factors = {name: t.double().requires_grad_() for name, t in factors.items()}
        self.scale = scale
        self.top_k = top_k
        self.normalise = normalise

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        if f"{name}.lora_A.weight" in self.factors:
            # y = W x + scale B A x, for rows of x
            a = self.factors[f"{name}.lora_A.weight"]
            b = self.factors[f"{name}.lora_B.weight"]
            y = y + self.scale * (x @ a.T) @ b.T
        return y

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gated = F.silu(self.linear(f"{name}.gate_proj", x)) * self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", gated)

    def __call__(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[T, H]`` to (output ``[T, H]``, probabilities ``[T, E]``, zero where an expert
        was not chosen)."""
        # The softmax is over all experts, chosen or not; only then are the best k taken.
        all_TE = self.linear("gate", x_TH).softmax(-1)
        chosen_Tk = all_TE.topk(self.top_k).indices
        probabilities_TE = torch.zeros_like(all_TE).scatter(
            1, chosen_Tk, all_TE.gather(1, chosen_Tk)
        )
        if self.normalise:
            # over the chosen ones: all others are zero
            probabilities_TE = probabilities_TE / probabilities_TE.sum(-1, keepdim=True)
        outputs = []
        for x_H, p_E, experts in zip(x_TH, probabilities_TE, chosen_Tk.tolist(), strict=True):
            y_H = torch.zeros_like(x_H)
            for e in experts:
                y_H = y_H + p_E[e] * self.mlp(f"experts.{e}", x_H)
            outputs.append(y_H)
        y_TH = torch.stack(outputs)
        if "shared_expert_gate.weight" in self.weights:
            # Qwen2: every token goes to the shared expert, weighted by a gate [T, 1] of its own.
            gate_T1 = self.linear("shared_expert_gate", x_TH).sigmoid()
            y_TH = y_TH + gate_T1 * self.mlp("shared_expert", x_TH)
        return y_TH, probabilities_TE


def layer_of(base: Path, layer: int, factors: Mapping[str, Tensor], scale: float) -> MoELayer:
    """The layer of a Hugging Face folder, with the factors of a PEFT file that belong to it."""
    config = json.loads((base / "config.json").read_text())
    prefix = f"model.layers.{layer}.mlp."
    weights = {}
    for shard in base.glob("*.safetensors"):
        for name, t in load_file(shard).items():
            if name.startswith(prefix):
                weights[name.removeprefix(prefix)] = t
    adapter = {}
    for name, t in factors.items():
        # PEFT puts its own prefix before the module's name.
        name = name.removeprefix("base_model.model.")
        if name.startswith(prefix):
            adapter[name.removeprefix(prefix)] = t.detach().clone()
    top_k = config["num_experts_per_tok"]
    return MoELayer(weights, adapter, scale, top_k, config["norm_topk_prob"])
