"""One Qwen mixture-of-experts layer with LoRA, as plainly as it can be said: loops, no fusion, no
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
            y = (
                y
                + self.scale
                * (x @ self.factors[f"{name}.lora_A.weight"].T)
                @ self.factors[f"{name}.lora_B.weight"].T
            )
        return y

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gated = F.silu(self.linear(f"{name}.gate_proj", x)) * self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", gated)

    def __call__(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[T, H]`` to (output ``[T, H]``, probabilities ``[T, E]``, zero where an expert
        was not chosen)."""
        all_TE = self.linear("gate", x_TH).softmax(-1)
        chosen_Tk = all_TE.topk(self.top_k).indices
        probabilities_TE = torch.zeros_like(all_TE).scatter(
            1, chosen_Tk, all_TE.gather(1, chosen_Tk)
        )
        if self.normalise:
            probabilities_TE = probabilities_TE / probabilities_TE.sum(-1, keepdim=True)
        outputs = []
        for x_H, p_E, experts in zip(x_TH, probabilities_TE, chosen_Tk.tolist(), strict=True):
            outputs.append(
                torch.stack([p_E[e] * self.mlp(f"experts.{e}", x_H) for e in experts]).sum(0)
            )
        y_TH = torch.stack(outputs)
        if "shared_expert_gate.weight" in self.weights:
            y_TH = y_TH + self.linear("shared_expert_gate", x_TH).sigmoid() * self.mlp(
                "shared_expert", x_TH
            )
        return y_TH, probabilities_TE


def layer_of(base: Path, layer: int, factors: Mapping[str, Tensor], scale: float) -> MoELayer:
    """The layer of a Hugging Face folder, with the factors of a PEFT file that belong to it."""
    config = json.loads((base / "config.json").read_text())
    prefix = f"model.layers.{layer}.mlp."
    weights = {
        name: t for shard in base.glob("*.safetensors") for name, t in load_file(shard).items()
    }
    adapter = {
        name.removeprefix("base_model.model."): t.detach().clone() for name, t in factors.items()
    }
    of_layer = [
        {name.removeprefix(prefix): t for name, t in ts.items() if name.startswith(prefix)}
        for ts in (weights, adapter)
    ]
    return MoELayer(*of_layer, scale, config["num_experts_per_tok"], config["norm_topk_prob"])
