"""What decoding costs a step: bytes of its operations, how often a layer's weights are decoded, and
seconds that grow by both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megalora_kernels import Nested, QuantisedWeight, block_bytes, coded_gemm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalora.config import LoRAConfig, ModelConfig, ParallelConfig, RunConfig
from megalora.model.account import open_folder
from megalora.model.formats.coded import Coded, Double
from megalora.model.held import Held, held_of
from megalora.model.held_codes import HeldCodes
from megalora.planner import decode_cost
from megalora.planner.cost import step_time
from megalora.planner.decode_cost import DECODING, decode_bytes
from megalora.planner.figure import MEMORY, TIME, grouped
from megalora.planner.hardware import Constant
from megalora.planner.layouts import ParallelLayout
from megalora.planner.ledger import Ledger
from megalora.planner.memory import DECODED, memory_of
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload
from tests.distributed.ranks import run_ranks
from tests.model.quantised.test_training import LORA, SIZES
from tests.oracles.base import make_base
from tests.parity.built import built
from tests.parity.runs import make_config
from tests.planner.priced import FREE, model

BYTES = replace(FREE, memory=Constant(1.0))
"""A machine on which a byte that is read or written takes a second, and all else nothing."""
EVERYTHING = LoRAConfig(rank=16)


class Traffic(TorchDispatchMode):
    """Counts bytes that operations read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket is not torch.ops.aten._unsafe_view:
            written = kwargs.get("out") if kwargs else None
            read = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            for tensor in (*read, out if written is None else written):
                self.num_bytes += tensor.numel() * tensor.element_size()
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "grain"), [("nf4", (1, 64)), ("nf4", (1, 9)), ("fp8", (32, 64))])
def test_bytes_are_those_of_the_operations(form: Any, grain: Any, dtype: torch.dtype) -> None:
    sizes = (3, 128, 576)
    p, q = grain
    width = 576 if form == "fp8" else 576 // q * block_bytes(q)
    codes = torch.zeros(3, 128, width, dtype=torch.uint8)
    weight = QuantisedWeight(form, codes, torch.ones(3, 128 // p, 576 // q), grain)
    out = torch.empty(sizes, dtype=dtype)
    with Traffic() as counted:
        weight.decode_into(out)
    said = decode_bytes(Coded(form, grain), sizes, out.element_size())
    # Tables of 256 values are not counted.
    assert counted.num_bytes == pytest.approx(said, rel=0.02)


def test_bytes_of_scales_that_are_codes() -> None:
    sizes = (3, 128, 512)
    codes = torch.zeros(3, 128, 256, dtype=torch.uint8)
    nested = Nested(torch.ones(256), torch.ones(3, 4, 1), torch.ones(3, 1))
    scales = torch.zeros(3, 128, 8, dtype=torch.uint8)
    weight = QuantisedWeight("nf4", codes, scales, (1, 64), nested)
    out = torch.empty(sizes, dtype=torch.bfloat16)
    with Traffic() as counted:
        weight.decode_into(out)
    said = decode_bytes(Coded("nf4", (1, 64), Double(32, 8, 128)), sizes, 2)
    assert counted.num_bytes == pytest.approx(said, rel=0.02)
    assert said > decode_bytes(Coded("nf4", (1, 64)), sizes, 2)


def test_the_rule_is_the_kernels() -> None:
    assert decode_cost.IN_LOAD_ROWS == coded_gemm.IN_LOAD_ROWS
    assert decode_cost.LEAST_COLUMNS == {"nf4": 2 * coded_gemm.LEAST_K, "fp8": coded_gemm.LEAST_K}


def held_30b(form: Any, parts: Any = "linears") -> Held:
    """Linears of Qwen3-30B-A3B."""
    config = ModelConfig(path="-", weight_format="nf4", quantised_parts=parts)
    held = held_of(config, None, model(EVERYTHING).shape)
    assert held is not None
    return replace(held, form=form, block=(128, 128))


WEIGHT = {"nf4": 21 / 2 + 4 + 2 + 16 / 64, "fp8": 5 + 4 + 2 + 12 / 128}
"""Bytes for a weight of bfloat16, as counted above."""
GATE_UP = 128 * 2 * 768 * 2048
DOWN = 128 * 768 * 2048
QKV = (32 + 2 * 4) * 128 * 2048
O = 32 * 128 * 2048
TIMES = {
    "off": 2 * (GATE_UP + DOWN + QKV + O),
    # Recomputed values of experts and of the last dense linear are there when backward wants them.
    "full": 2 * (GATE_UP + DOWN) + 3 * QKV + 2 * O,
    "selective": 2 * (GATE_UP + DOWN + QKV + O),
}
"""Weights that a layer decodes for a microbatch."""


def both_times(held: Held, length: int, recompute: Any, work: Workload | None = None) -> Any:
    """(held, plain) seconds of four microbatches of one sample."""
    work = work or Workload(sequence_length=length, global_batch_size=4)
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1, recompute=recompute)
    found = []
    for how in (held, None):
        found.append(step_time(model(EVERYTHING), layout, replace(work, held=how), BYTES))
    return found


@pytest.mark.parametrize("recompute", TIMES)
@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_a_step_grows_by_the_counted_traffic(form: str, recompute: str) -> None:
    """8,192 tokens are 512 rows for an expert: too many to decode while loading."""
    ours, plain = both_times(held_30b(form), 8192, recompute)
    expected = 4 * 48 * TIMES[recompute] * WEIGHT[form]
    assert ours.seconds - plain.seconds == pytest.approx(expected, rel=1e-6)
    assert ours[DECODING] == pytest.approx(expected, rel=1e-6)
    assert not plain[DECODING]


def test_few_rows_are_decoded_while_they_are_loaded() -> None:
    """4,096 tokens are 256 rows for an expert, two tiles: forward of experts writes no values."""
    ours, _ = both_times(held_30b("nf4", "experts"), 4096, "off")
    experts = GATE_UP + DOWN
    assert ours[DECODING] == pytest.approx(4 * 48 * experts * (WEIGHT["nf4"] + 2 * 1.05), rel=1e-6)
    assert ours.basis == "assumed"
    # A reference is one more forward.
    work = Workload(sequence_length=8192, global_batch_size=4, references=1)
    ours, plain = both_times(held_30b("nf4", "experts"), 8192, "off", work)
    expected = 3 * 4 * 48 * experts * WEIGHT["nf4"]
    assert ours.seconds - plain.seconds == pytest.approx(expected, rel=1e-6)


def test_norms_of_dora_decode_once_a_step() -> None:
    dora = replace(EVERYTHING, use_dora=True)
    work = Workload(sequence_length=8192, global_batch_size=4)
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1)
    work = replace(work, held=held_30b("nf4"))
    found = step_time(model(dora), layout, work, BYTES)
    once = 48 * (GATE_UP + DOWN + QKV + O) * WEIGHT["nf4"]
    assert found[DECODING] == pytest.approx(4 * 48 * TIMES["off"] * WEIGHT["nf4"] + once, rel=1e-6)


def test_the_picture_has_a_group_for_both() -> None:
    work = Workload(sequence_length=8192, global_batch_size=4, held=held_30b("nf4"))
    assert grouped({DECODING: 1.0, f"recompute {DECODING}": 1.0}, TIME)
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1)
    parts = memory_of(model(EVERYTHING).shape, EVERYTHING, layout, work)
    assert grouped({DECODED: parts[DECODED]}, MEMORY)


def count_decoded(config: RunConfig) -> int:
    """How often a step decodes; a rank function."""
    with built(config) as run:
        found = {}
        for chunk in run.model.chunks:
            for module in chunk.modules():
                if isinstance(module, HeldCodes):
                    module.scratch.forget()
                    found[id(module.scratch)] = module.scratch
        before = sum(scratch.filled for scratch in found.values())
        run.stepper.train(run.batches.of_step(0), run.optimizer)
        return sum(scratch.filled for scratch in found.values()) - before


class Counting(decode_cost.Decoding):
    """Counts decoded weights of one layer."""

    def _decode(self, to: Any, layer: int, modules: Any) -> None:
        self.counted = getattr(self, "counted", 0) + len(list(modules))


# Of the last layer what forward has just decoded is there for its backward, or for recomputing it:
# experts' weights and, if nothing is recomputed, one dense one. Experts' weights of the first layer
# are there for the next microbatch, and its qkv has no backward: no input needs a gradient.
@pytest.mark.parametrize(("recompute", "of_last"), [("off", 3), ("full", 2), ("selective", 3)])
def test_a_layer_decodes_as_often_as_planned(
    chats: Path, tmp_path: Path, recompute: Any, of_last: int
) -> None:
    base = make_base(tmp_path / "base", **SIZES, num_hidden_layers=3)
    config = make_config(
        base, chats, tmp_path / "out", {}, recompute, lora=LORA, weight_format="nf4",
        global_batch_size=4, micro_batch_size=2,
    )  # fmt: skip
    (found,) = run_ranks(count_decoded, 1, config)
    shape = open_folder(base).shape
    work = Workload(
        sequence_length=64, global_batch_size=4, dtype="float32",
        held=held_of(config.model, None, shape), on_cpu=True,
    )  # fmt: skip
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1, recompute=recompute)
    costs = Counting(PlannedModel.of(shape, LORA), layout, work, BYTES)
    costs.decode(Ledger(), Ledger(), Ledger(), 0, recompute)
    # Three layers, two microbatches.
    assert found == 2 * (3 * costs.counted - of_last) - 2 - 2
