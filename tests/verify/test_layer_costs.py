"""Check what the layer check costs in memory and in tensors read, and that it changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megalora.config import LoRAConfig, RunConfig
from megalora.tiny import make_tiny
from megalora.train.loop import train
from megalora.verify import compare_layer, records
from megalora.verify.loaded import Loaded
from megalora.verify.reference import Reference
from tests.distributed.ranks import run_ranks
from tests.parity.everything import NAMES
from tests.parity.runs import make_config
from tests.parity.runs import records as written
from tests.verify.built import loaded, said, said_in


def _needed(base: Path) -> tuple[int, int, float]:
    """Experts gathered, experts that transformers got, largest gate of the second input."""
    seen: dict[str, Any] = {}
    # Patched for good: this runs in a forked rank, which ends afterwards.
    gather = Loaded.layer
    load = Reference.load_experts
    drive = records.driven

    def gathered(self: Any, number: int, experts: Any) -> Any:
        seen["ours"] = len(experts)
        return gather(self, number, experts)

    def read(self: Any, number: int, chosen: Any) -> None:
        load(self, number, chosen)
        # [E, 2I, H], gate's rows first.
        gate_up = self.experts.gate_up_proj
        seen["theirs"] = gate_up.shape[0]
        gates = torch.einsum("th,eih->tei", seen["driven"], gate_up.chunk(2, 1)[0])
        seen["gate"] = gates.abs().max().item()

    def driven(h_TH: torch.Tensor) -> torch.Tensor:
        seen["driven"] = drive(h_TH)
        return seen["driven"]

    Loaded.layer = gathered  # type: ignore[method-assign]
    Reference.load_experts = read  # type: ignore[method-assign]
    records.driven = driven  # type: ignore[assignment]
    with loaded(base) as (chunks, groups):
        assert said(chunks, groups, base).startswith("base:")
    return seen["ours"], seen["theirs"], seen["gate"]


def test_experts_that_do_not_fit_the_host_are_refused(tiny, monkeypatch):
    # 1 MiB; the experts of Qwen3-235B, gathered on one host, would be many GiB.
    monkeypatch.setattr(compare_layer, "free_host_memory_bytes", lambda: 2**20)
    for line in run_ranks(said_in, 2, tiny, {"ep": 2}, "float32"):
        assert (
            line == f"ValueError: train.check_base: layer 3 (MoE) of {tiny}: the 7 experts that the"
            " check's tokens need take 0.0 GiB of host memory on the first rank, which has 0.0"
            " GiB free. Free some, or train without the check: train.check_base=off."
        )


def test_only_experts_that_the_tokens_need_are_gathered_and_read(tmp_path):
    base = make_tiny(tmp_path / "m", num_experts=96, num_experts_per_tok=2, num_hidden_layers=1)
    ours, theirs, largest_gate = run_ranks(_needed, 1, base)[0]
    assert ours == theirs <= 64, "sixteen tokens twice, two experts each"
    # The second input drives gates far beyond where activations are alike (ReLU6 ends at 6).
    assert largest_gate > 20


@pytest.mark.parametrize("model", ["tiny", "everything"])
def test_float64_says_what_rounding_is(model, request):
    """transformers in float32 against itself in float64: the tolerance is more than ten times
    that."""
    from benchmarks.layer_check import rounding

    found = rounding(request.getfixturevalue(model), torch.float32)
    assert {"attention", "MLP", "MLP (second input)", "residual sums"} <= found.keys()
    assert max(found.values()) < records.TOLERANCE / 10


def _measured(folder: Path) -> dict[str, Any]:
    """The benchmark's record, on a model small enough for a test."""
    from benchmarks import layer_check

    sizes = {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 128, "intermediate_size": 96,
    }  # fmt: skip
    base = layer_check.write_base(folder, {**layer_check.BASE, **sizes})
    return layer_check.measure(base, runs=2)


def test_the_benchmark_measures_a_check_that_passes(tmp_path):
    record = run_ranks(_measured, 1, tmp_path)[0]
    assert record["line"].startswith(
        "base: layer 0 (MoE), embedding and head equal transformers' to "
    )
    assert len(record["seconds"]) == len(record["cpu_seconds"]) == 2
    assert max(record["rounding_of_transformers"].values()) < records.TOLERANCE


@pytest.mark.slow
def test_a_run_is_the_same_to_the_bit_with_and_without_the_check(everything, chats, tmp_path):
    # Dropout, because a check that draws random numbers would shift its masks.
    lora = LoRAConfig(rank=3, alpha=12.0, dropout=0.3, target_modules=NAMES)
    runs = {}
    # "loss" makes both comparisons, that of a layer and that of the loss.
    for check in ("off", "loss"):
        config: RunConfig = make_config(
            everything,
            chats,
            tmp_path / check,
            {"tp": 2, "ep": 2},
            lora=lora,
            steps=2,
            check_base=check,
        )
        run_ranks(train, 2, config)
        runs[check] = load_file(tmp_path / check / "step_000002" / "adapter_model.safetensors")
        assert written(tmp_path / check, "loss") == written(tmp_path / "off", "loss")
    assert runs["loss"].keys() == runs["off"].keys()
    for name, tensor in runs["off"].items():
        # As bits: 0.0 and -0.0 are equal as numbers.
        assert torch.equal(runs["loss"][name].view(torch.int32), tensor.view(torch.int32)), name


def test_a_rotary_table_may_differ_by_its_frequencies_rounding_alone():
    # The last of 131,072 positions: there the last bit of a frequency turns by half a degree.
    positions = torch.tensor([1.0, 1000.0, 131071.0])
    # Heads of 64 features, base 1e6.
    frequencies = 1e6 ** (-torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    angles = positions[:, None] * frequencies
    theirs = positions[:, None] * torch.nextafter(frequencies, torch.tensor(1.0))
    # In units of what that rounding may make.
    assert records.rotary_difference(angles, theirs.cos(), theirs.sin()) < 1
    # Low frequencies divided by 4, as YaRN and Llama 3 do.
    scaled = positions[:, None] * torch.where(frequencies < 1e-4, frequencies / 4, frequencies)
    assert records.rotary_difference(angles, scaled.cos(), scaled.sin()) > 1000
    assert records.rotary_difference(angles, 1.2 * angles.cos(), 1.2 * angles.sin()) < 1, (
        "attention's factor"
    )


def test_a_number_that_is_none_is_no_agreement():
    value = torch.ones(records.NUM_TOKENS, 3)
    assert records.relative_difference(value, value) == 0
    for wrong in (value * torch.nan, value * torch.inf, torch.ones(records.NUM_TOKENS, 4)):
        assert records.first_difference([("head", wrong)], [("head", value)]) == ("head", torch.inf)
    small = value.clone()
    small[3] *= 1e-4
    small_and_off = small.clone()
    # 1e-7 of the largest number, but 1e-3 of its own token, and that is what counts.
    small_and_off[3, 0] *= 1.001
    assert records.relative_difference(small_and_off, small) == pytest.approx(1e-3, rel=1e-2)
