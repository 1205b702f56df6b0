"""Draw the base weights that every training arm shares: each process draws its own, and all hold
the same values."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator whose numbers are a function of ``key``."""
    # Python's own hash of a string differs from process to process. 63 bits: seeds are int64.
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class RandomWeights(Mapping[str, Tensor]):
    """Published name to tensor, drawn when it is asked for: norms are 1, the embedding is N(0, 1),
    others are N(0, 1 / inputs), so that activations keep their size through the layers.

    Experts have the names of published files, one matrix each. ``stacked`` gives those of a layer
    in one tensor.
    """

    def __init__(
        self, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.seed = seed
        self.shapes = dict(self._shapes())
        # A layer's experts are asked for one by one; each time all 128 would be drawn.
        self._last: tuple[str, Tensor] | None = None

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes as transformers has them, experts stacked."""
        c = self.config
        H = c["hidden_size"]
        E = c["num_experts"]
        inner = c["moe_intermediate_size"]
        width = c["head_dim"]
        q = c["num_attention_heads"] * width
        kv = c["num_key_value_heads"] * width
        yield "model.embed_tokens.weight", (c["vocab_size"], H)
        yield "lm_head.weight", (c["vocab_size"], H)
        yield "model.norm.weight", (H,)
        layer = {
            "input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,),
            "self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,),
            "self_attn.q_proj.weight": (q, H), "self_attn.k_proj.weight": (kv, H),
            "self_attn.v_proj.weight": (kv, H), "self_attn.o_proj.weight": (H, q),
            "mlp.gate.weight": (E, H),
            "mlp.experts.gate_up_proj": (E, 2 * inner, H), "mlp.experts.down_proj": (E, H, inner),
        }  # fmt: skip
        for i in range(c["num_hidden_layers"]):
            for name, shape in layer.items():
                yield f"model.layers.{i}.{name}", shape

    def stacked(self, name: str) -> Tensor:
        """A tensor as transformers holds it, with a layer's experts in one; the last is kept."""
        if self._last is None or self._last[0] != name:
            shape = self.shapes[name]
            if "norm" in name:
                tensor = torch.ones(shape, dtype=self.dtype, device=self.device)
            else:
                g = generator(self.device, self.seed, name)
                tensor = torch.randn(shape, generator=g, dtype=self.dtype, device=self.device)
                if "embed" not in name:
                    tensor *= shape[-1] ** -0.5
            self._last = (name, tensor)
        return self._last[1]

    def __getitem__(self, name: str) -> Tensor:
        if ".mlp.experts." not in name:
            return self.stacked(name)
        # "model.layers.0.mlp" and "5.gate_proj.weight"
        layer, _, rest = name.partition(".experts.")
        expert, projection, _ = rest.split(".")
        if projection == "down_proj":
            return self.stacked(f"{layer}.experts.down_proj")[int(expert)]
        # [2 I, H]: gate's rows, then up's.
        halves = self.stacked(f"{layer}.experts.gate_up_proj")[int(expert)].chunk(2)
        return halves[projection == "up_proj"]

    def __iter__(self) -> Iterator[str]:
        for name in self.shapes:
            if ".experts." not in name:
                yield name
            # Once for each layer: its other stacked tensor, down_proj, is named here too.
            elif name.endswith("gate_up_proj"):
                layer = name.removesuffix("gate_up_proj")
                for e in range(self.config["num_experts"]):
                    for projection in EXPERT_PROJECTIONS:
                        yield f"{layer}{e}.{projection}.weight"

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Write the weights into a model of transformers."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.stacked(name))
