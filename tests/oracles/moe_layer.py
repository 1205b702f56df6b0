"""One Qwen mixture-of-experts layer with LoRA, as plainly as it can be said: loops, no fusion, no parallelism, float64.

After the formulas of the Qwen2-MoE and Qwen3-MoE reports; test_moe_layer.py compares it with transformers' blocks. Names are those of
the checkpoint below ``mlp.``: ``gate.weight``, ``experts.3.up_proj.weight``, ``shared_expert.down_proj.weight``; factors have
``.lora_A.weight`` and ``.lora_B.weight`` in their place.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


class MoELayer:
    def __init__(
        self, weights: Mapping[str, Tensor], factors: Mapping[str, Tensor], scale: float, top_k: int, normalise: bool
    ) -> None:
        """``normalise``: whether the chosen probabilities are divided by their sum."""
        self.weights = {name: t.double() for name, t in weights.items()}
        self.factors = {name: t.double().requires_grad_() for name, t in factors.items()}
        self.scale, self.top_k, self.normalise = scale, top_k, normalise

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        if f"{name}.lora_A.weight" in self.factors:
            y = y + self.scale * (x @ self.factors[f"{name}.lora_A.weight"].T) @ self.factors[f"{name}.lora_B.weight"].T
        return y

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gated = F.silu(self.linear(f"{name}.gate_proj", x)) * self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", gated)

    def __call__(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[T, H]`` to (output ``[T, H]``, probabilities ``[T, E]``, zero where an expert was not chosen)."""
        all_TE = self.linear("gate", x_TH).softmax(-1)
        chosen_Tk = all_TE.topk(self.top_k).indices
        probabilities_TE = torch.zeros_like(all_TE).scatter(1, chosen_Tk, all_TE.gather(1, chosen_Tk))
        if self.normalise:
            probabilities_TE = probabilities_TE / probabilities_TE.sum(-1, keepdim=True)
        outputs = []
        for x_H, p_E, experts in zip(x_TH, probabilities_TE, chosen_Tk.tolist(), strict=True):
            outputs.append(torch.stack([p_E[e] * self.mlp(f"experts.{e}", x_H) for e in experts]).sum(0))
        y_TH = torch.stack(outputs)
        if "shared_expert_gate.weight" in self.weights:
            y_TH = y_TH + self.linear("shared_expert_gate", x_TH).sigmoid() * self.mlp("shared_expert", x_TH)
        return y_TH, probabilities_TE
