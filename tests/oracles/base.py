"""Change base folders by hand, and compute their logits with transformers and with megalora."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalora.config import ModelConfig, ParallelConfig
from megalora.model.account import open_folder
from megalora.model.build import build_model
from megalora.parallel import parallel_groups
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.named_tensors import Change, Tensors

# Two sequences of 40. The factor 7 is coprime to 509, a prime below the vocabulary's 512: all 80
# tokens differ.
TOKENS = torch.arange(2 * 40).view(2, 40) * 7 % 509


def stored_tensors(folder: Path) -> Tensors:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def make_base(out: Path, arch: str = "qwen3_moe", **overrides: Any) -> Path:
    """A tiny base of two layers, in one file without an index."""
    make_tiny(out, arch=arch, **{"num_hidden_layers": 2, **overrides})
    rewrite(out)
    return out


def rewrite(folder: Path, change: Change | None = None, **config: Any) -> Path:
    """Store the folder's tensors anew, as ``change`` returns them, and set fields of its config;
    ``...`` removes a field."""
    tensors = stored_tensors(folder)
    if change is not None:
        tensors = change(dict(tensors))
    # An index of shards that are gone would be read first.
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    # safetensors refuses tensors that share memory, as views of one do.
    own_memory = {name: t.clone().contiguous() for name, t in tensors.items()}
    save_file(own_memory, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | config
    # None is a value of its own here (JSON's null), so absence is written as an ellipsis.
    for name, value in config.items():
        if value is ...:
            del fields[name]
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    return folder


@torch.no_grad()
def transformers_logits(folder: Path, tokens: Tensor = TOKENS) -> Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    # transformers only warns of a missing tensor, and draws it at random.
    assert not report["missing_keys"], report["missing_keys"]
    return model.eval()(tokens).logits


@torch.no_grad()
def logits_of_ranks(
    folders: Iterable[Path], sizes: dict[str, int], tokens: Tensor = TOKENS
) -> list[Tensor]:
    """In a world that exists: each folder's logits ``[B, S, V/tp]`` on this rank, without pipeline
    stages."""
    found = []
    for folder in folders:
        parallel = ParallelConfig(**sizes)
        with parallel_groups(parallel):
            config = ModelConfig(path=str(folder), dtype="float32", weight_format="plain")
            chunk: Any = build_model(config, parallel, open_folder(folder).shape, folder)[0].eval()
            # Megatron's rotary embedding counts positions itself; the argument must be there.
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            # A copy: the result may share memory that goes with the groups.
            found.append(chunk(tokens, positions, None).clone())
    return found


def own_logits(folder: Path, tokens: Tensor = TOKENS) -> Tensor:
    """megalora's logits, on one rank.

    A forked one: Megatron's rotary embedding keeps what called it, and with it gloo groups, in a
    cache of the class; a process that forks ranks must not hold any.
    """
    return run_ranks(logits_of_ranks, 1, [folder], {}, tokens)[0][0]


def failure_of(folder: Path) -> str:
    """In a world that exists: what loading the folder raises, as ``type: text``."""
    try:
        logits_of_ranks([folder], {})
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
