"""Copy base folders with another config.json or other tensors, for tests of the layer check."""

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
    out = {}
    # Layer's MLP -> number of an expert -> its matrices by projection.
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if ".mlp.experts." not in name:
            out[name] = tensor
            continue
        # model.layers.N.mlp.experts.E.PROJECTION.weight
        mlp, _, rest = name.partition(".experts.")
        number, projection, _ = rest.split(".")
        experts.setdefault(mlp, {}).setdefault(int(number), {})[projection] = tensor
    for mlp, by_number in experts.items():
        gate_up = []
        down = []
        # By number, which the names' order is not: 10 stands before 2.
        for _, matrices in sorted(by_number.items()):
            gate_up.append(torch.cat([matrices["gate_proj"], matrices["up_proj"]]))
            down.append(matrices["down_proj"])
        out[f"{mlp}.experts.gate_up_proj"] = torch.stack(gate_up)
        out[f"{mlp}.experts.down_proj"] = torch.stack(down)
    return out


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the model without a head saves them."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def biased(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a bias on each of attention's projections."""
    generator = torch.Generator().manual_seed(3)
    biases = {}
    for name, weight in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            # As large as the projections' own outputs.
            bias = torch.randn(weight.shape[0], generator=generator)
            biases[name.replace(".weight", ".bias")] = bias
    return tensors | biases
