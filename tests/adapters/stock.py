"""Make adapters with stock PEFT, and compare logits of what megalora reads of them with PEFT's own,
on bases that are loaded once."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from megalora.adapters.read.adapter import Adapter, read_adapter
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape
from tests.adapters.adapters import Trained, load_base, logits, merged_by_hand
from tests.adapters.folders import refused
from tests.named_tensors import cast

ATOL = 3e-5
"""Logits reach 3; their float32 rounding over four layers is 1e-5, by which kernels the machine has
a little more or less. An adapter of these tests moves them by 0.1 or more."""
_loaded = cache(load_base)


def base_model(base: Path) -> Any:
    """A copy of transformers' model; loading it takes ten times as long."""
    return copy.deepcopy(_loaded(base))


def shape_of(base: Path) -> ModelShape:
    return model_shape(read_hf_config(base))


def new_adapter(base: Path, seed: int = 1, **options: Any) -> Any:
    """Stock PEFT's model of an adapter with random factors, as after some training."""
    return randomized(untrained_adapter(base, **options), seed)


def untrained_adapter(base: Path, **options: Any) -> Any:
    """Stock PEFT's model as training starts with it."""
    # alpha is not r, so that a scale of 1 in place of alpha / r is seen.
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **options})
    model = base_model(base)
    # PEFT draws A from the global generator: without a seed every run would compare other numbers.
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, config).eval()


def randomized(model: Any, seed: int) -> Any:
    """``model`` with random numbers added to every B, and to every A that starts as zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # B A starts as zero, in most of PEFT's starts because B does, in MiCA because A does.
            if ".lora_B" in name or (".lora_A" in name and not parameter.any()):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def loaded_by_peft(folder: Path, base: Path) -> Tensor:
    """Logits of the base with the folder, as stock PEFT loads it."""
    return logits(PeftModel.from_pretrained(base_model(base), str(folder)).eval())


def read_logits(folder: Path, base: Path, order: Any = None) -> tuple[Adapter, Tensor]:
    """What megalora reads of the folder, and logits of the base with its A, B and scales added to
    the weights."""
    read = read_adapter(folder, shape_of(base), order, base)
    # B A of factors in half precision is computed in float32, as PEFT does after loading them.
    wide = cast(torch.float32)(read.tensors)
    trained = Trained(base, shape_of(base), read.adapted, wide, folder)
    return read, logits(merged_by_hand(trained, base_model(base)))


def refusal(folder: Path, base: Path) -> str:
    """What reading the folder for the base is refused with."""
    return refused(lambda: read_adapter(folder, shape_of(base)))


def check_equal(folder: Path, base: Path, expected: Tensor) -> Adapter:
    """The folder means to megalora what ``expected`` says, and that is not the base."""
    read, found = read_logits(folder, base)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    # An adapter without effect would prove nothing.
    assert (expected - logits(_loaded(base))).abs().max() > 0.1
    return read
