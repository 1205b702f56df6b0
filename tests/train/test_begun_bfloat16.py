"""Train PiSSA in bfloat16: what is added to the base keeps bfloat16's relative precision."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megalora.adapters.files import WEIGHTS
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.trained import trained_form
from megalora.adapters.training_state import read_state
from megalora.config import LoRAConfig, RunConfig
from megalora.hf.json_file import read_hf_config
from megalora.hf.tensor_names import tensor_name
from megalora.lora.factors import LoRAFactors
from megalora.lora.spec import Adapted
from megalora.model.fields import model_shape
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.runs import make_config, records
from tests.whole_state import gathered_state, whole_state

NAMES = ["o_proj", "gate_proj", "up_proj", "down_proj", "gate"]
LORA = LoRAConfig(rank=4, alpha=8.0, target_modules=NAMES, init="olora")
STEPS = 4
LR = 1e-4
"""A step moves an entry of A, which is about 0.1, by less than half of what bfloat16 resolves."""
LIMIT = 2**-7
"""Of the update. Each factor and each product is rounded to at most 2^-9 of itself, a few such
roundings in a row; 0.2 % was measured."""


def product(masters: dict[str, Tensor], module: str) -> Tensor:
    """B A - B0 A0 of a linear in float64, by the definition."""
    b0 = masters[tensor_name(module, "B0")].double()
    return whole_product(masters, module) - b0 @ masters[tensor_name(module, "A0")].double()


def whole_product(masters: dict[str, Tensor], module: str) -> Tensor:
    """B A of a linear in float64."""
    b = masters[tensor_name(module, "B0")].double() + masters[tensor_name(module, "B")].double()
    a = masters[tensor_name(module, "A0")].double() + masters[tensor_name(module, "A")].double()
    return b @ a


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def errors_in_the_model(config: RunConfig) -> dict[str, float]:
    """Module -> relative error of what it adds to its linear after some steps; a rank function."""
    errors: dict[str, float] = {}
    with built(config) as run:
        for step in range(STEPS):
            run.step(step, LR)
        trained = [shard.parameter for shard in run.model.trained]
        masters = gathered_state(run.optimizer, "param", trained, run.groups)
        values = {**run.model.values(), **masters}
        whole = {shard.name: shard.of(values) for shard in run.model.shards}
        for chunk in run.model.chunks:
            for factors in chunk.modules():
                if isinstance(factors, LoRAFactors):
                    errors |= errors_of(factors, whole)
    return errors


@torch.no_grad()
def errors_of(factors: LoRAFactors, masters: dict[str, Tensor]) -> dict[str, float]:
    """The same of one module on one rank."""
    if not factors.is_expert:
        (a,) = factors.adapted
        x = torch.randn(64, a.in_features, generator=torch.Generator().manual_seed(0))
        x = x.bfloat16()
        found = factors.times_a(x, 0.0) @ factors.stacked_b().T
        module = a.hf_module()
        wanted = a.scale * x.double() @ product(masters, module).T
        errors = {module: relative(found, wanted)}
        torch.manual_seed(1)
        found = factors.times_a(x, 0.5) @ factors.stacked_b().T
        torch.manual_seed(1)
        left = F.dropout(x, 0.5).double()
        # A reads what dropout leaves, A0 all of x.
        wanted = wanted + a.scale * (left - x.double()) @ whole_product(masters, module).T
        errors[f"{module}.dropout"] = relative(found, wanted)
        return errors
    errors: dict[str, float] = {}
    operands = factors.adapter()
    for i, first, last in operands.ranks():
        for expert in factors.experts:
            module = factors.adapted[i].hf_module(expert)
            b = operands.b[i]
            assert b is not None
            found = b[expert].double() @ operands.a[expert, first:last].double()
            wanted = product(masters, module)
            # An expert without tokens has not changed.
            if wanted.any():
                errors[module] = relative(found, wanted)
    return errors


def make(tiny: Path, chats: Path, out: Path, dtype: str, lora: LoRAConfig = LORA) -> RunConfig:
    return make_config(tiny, chats, out, {}, lora=lora, dtype=dtype, steps=STEPS, lr=LR)


def test_bfloat16_rounds_the_update_and_not_a(tiny: Path, chats: Path, tmp_path: Path) -> None:
    errors: dict[str, float] = run_ranks(
        errors_in_the_model, 1, make(tiny, chats, tmp_path, "bfloat16")
    )[0]
    assert {module.rsplit(".", 1)[-1] for module in errors} == {*NAMES, "dropout"}
    assert max(errors.values()) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_files_and_losses_are_those_of_float32(
    init: str, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    lora = replace(LORA, init=init)
    decrease: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        config = make(tiny, chats, tmp_path / dtype, dtype, lora)
        config = replace(config, train=replace(config.train, eval_every=STEPS))
        run_ranks(train, 1, config)
        losses = records(tmp_path / dtype, "eval_loss")
        decrease[dtype] = losses[0] - losses[-1]
    folder = tmp_path / f"bfloat16/step_{STEPS:06}"
    shape = model_shape(read_hf_config(tiny))
    adapted = read_state(folder).trained(shape)
    masters: dict[str, Tensor] = {}
    for name, tensor in whole_state(folder).items():
        if name.startswith("param."):
            masters[name.removeprefix("param.")] = tensor
    file = load_file(folder / WEIGHTS)
    assert {tensor.dtype for tensor in file.values()} == {torch.bfloat16}
    assert max(errors_in_file(adapted, masters, file)) <= LIMIT
    # Its own training state agrees with it.
    trained_form(read_adapter(folder, shape), shape)
    assert decrease["bfloat16"] == pytest.approx(decrease["float32"], rel=0.06)


def errors_in_file(
    adapted: list[Adapted], masters: dict[str, Tensor], file: dict[str, Tensor]
) -> list[float]:
    """Relative error of B A of each linear in an adapter's file."""
    errors: list[float] = []
    for a in adapted:
        for module in a.hf_modules():
            wanted = product(masters, module)
            b = file[tensor_name(module, "B")].double()
            if wanted.any():
                errors.append(relative(b @ file[tensor_name(module, "A")].double(), wanted))
    return errors
