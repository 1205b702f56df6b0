"""Base models for the layer check: tiny folders, and copies of them whose config.json or files say
something else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def with_config(base: Path, out: Path, **fields: Any) -> Path:
    """The same weights under a config.json with other fields; None takes a field away."""
    shutil.copytree(base, out)
    config = json.loads((out / "config.json").read_text())
    for name, value in fields.items():
        config.pop(name, None)
        if value is not None:
            config[name] = value
    (out / "config.json").write_text(json.dumps(config))
    return out


def with_tensors(
    base: Path, out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Path:
    """The same config over other tensors, in one file."""
    shutil.copytree(base, out)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(out.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(change(tensors), out / "model.safetensors", metadata={"format": "pt"})
    return out


def packed_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as transformers 5 holds them in memory: ``gate_up_proj [E, 2I, H]`` and ``down_proj
    [E, H, I]``."""
    out = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for layer in {name.split(".experts.")[0] for name in tensors.keys() - out.keys()}:
        numbers = set()
        for name in tensors:
            if name.startswith(f"{layer}.experts."):
                numbers.add(int(name.removeprefix(f"{layer}.experts.").split(".")[0]))

        def matrix(expert: int, projection: str, layer: str = layer) -> Tensor:
            return tensors[f"{layer}.experts.{expert}.{projection}.weight"]

        pairs = [torch.cat([matrix(e, "gate_proj"), matrix(e, "up_proj")]) for e in sorted(numbers)]
        out[f"{layer}.experts.gate_up_proj"] = torch.stack(pairs)
        out[f"{layer}.experts.down_proj"] = torch.stack(
            [matrix(e, "down_proj") for e in sorted(numbers)]
        )
    return out


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the model without a head saves them."""
    return {name.removeprefix("model."): t for name, t in tensors.items()}


def biased(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a bias on each of attention's projections."""
    generator = torch.Generator().manual_seed(3)
    biases = {}
    for name, weight in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            bias = torch.randn(weight.shape[0], generator=generator)
            biases[name.replace(".weight", ".bias")] = bias
    return tensors | biases
