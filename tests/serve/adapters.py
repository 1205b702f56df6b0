"""Random adapters in folders, as megalora exports them, and ways to break them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from tests.parity.built import random_factors

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]
EVERYTHING = [*ATTENTION, *EXPERTS, "gate"]


def make_adapter(folder: Path, base: Path, seed: int, **lora: Any) -> Path:
    """A random adapter of ``base`` with deltas of about a fifth of the weights: different text for
    every seed."""
    config = LoRAConfig(**({"rank": 4, "alpha": 8.0, "target_modules": EVERYTHING} | lora))
    adapted, factors = random_factors(config, base, seed)
    folder.mkdir(parents=True)
    write_adapter(folder, adapted, model_shape(read_hf_config(base)), factors, str(base))
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(
        json.dumps({key: value for key, value in config.items() if value is not ...})
    )


def edit_tensors(folder: Path, change: Any) -> None:
    """``change`` gets the tensors by name and returns what the file shall hold."""
    tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    changed = change(tensors)
    save_file(
        {name: tensor.clone() for name, tensor in changed.items()}, folder / WEIGHTS
    )  # two names of one are refused


def tokens_of(seed: int, length: int, vocabulary: int = 512) -> list[int]:
    """A prompt; ordinary tokens only, so that nothing stops at one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary - 3, (length,), generator=generator).tolist()
