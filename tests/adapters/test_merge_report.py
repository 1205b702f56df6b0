"""Report how much of each delta survives the cast: compared with numbers by hand, and with float64
arithmetic on the files."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalora.adapters.merge import merge
from megalora.adapters.merge_report import MergedModule, MergeReport, projection
from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.lora.spec import tensor_name
from megalora.model.fields import model_shape
from megalora.tiny import make_tiny
from tests.adapters.folders import factors_of
from tests.adapters.merging import read, rewrite
from tests.named_tensors import cast
from tests.parity.built import random_factors

V_PROJ = "model.layers.{}.self_attn.v_proj"


def with_ones_in_v_proj(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """Set every weight of v_proj to 1."""
    for name, tensor in file.items():
        if "v_proj" in name:
            tensor.fill_(1)
    return file


def test_deltas_whose_fate_is_known(tmp_path: Path) -> None:
    """Every weight is 1, whose neighbour above is 1 + 2^-7 in bfloat16; every element of a layer's
    delta is the same."""
    base = make_tiny(tmp_path / "base", arch="qwen3", dtype="bfloat16")
    rewrite(base, with_ones_in_v_proj)
    shape = model_shape(read_hf_config(base))
    adapted = resolve(LoRAConfig(rank=2, alpha=8.0, target_modules=["v_proj"]), shape)
    # rounded to 1, exact, rounded to 1 + 2^-7, zero
    delta = [2**-9, 2**-7, 3 * 2**-9, 0.0]
    factors = {}
    for layer, value in enumerate(delta):
        # B A sums over two ranks, and the scale is alpha / rank = 4.
        factors[tensor_name(V_PROJ.format(layer), "A")] = torch.ones(2, 96)
        factors[tensor_name(V_PROJ.format(layer), "B")] = torch.full((64, 2), value / 2 / 4)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", adapted, shape, factors, str(base))
    report = merge(tmp_path / "adapter", str(base), tmp_path / "out")
    # (share of the delta that survives, relative error); 3/4 of a step becomes 1, so 4/3 of it.
    fate = [(0.0, 1.0), (1.0, 0.0), (4 / 3, 1 / 3), (None, None)]
    for layer, (module, (survived, error)) in enumerate(zip(report.modules, fate, strict=True)):
        # Frobenius norm of [64, 96] equal elements.
        norm = delta[layer] * (64 * 96) ** 0.5
        assert (module.module, module.dtype) == (V_PROJ.format(layer), "bfloat16")
        assert module.delta == pytest.approx(norm)
        # approx(None) is None: a delta of zero has no share that survives.
        assert module.survived == pytest.approx(survived)
        assert module.error == pytest.approx(error)
    # Mean of what survives: (0 + 1 + 4/3) / 3; of the errors: (1 + 0 + 1/3) / 3.
    size = sum(shard.stat().st_size for shard in base.glob("*.safetensors")) / 1e9
    assert report.text().splitlines() == [
        f"{tmp_path}/adapter merged into {base}: 4 modules, {size:,.3f} GB in {tmp_path}/out",
        (
            "projection            dtype  modules  zero  survived: lowest    mean  error: largest  "
            "   mean"
        ),
        (
            "self_attn.v_proj   bfloat16        4     1            0.0000  0.7778         1.0e+00 "
            " 4.4e-01"
        ),
        "the adapter is zero in 1 modules: they are the base's",
        (
            f"2 deltas changed by more than 10% when cast, {V_PROJ.format(0)}'s by 100%: they are"
            " small beside the steps of bfloat16. Serve the adapter unmerged, or merge into a"
            " float32 copy of the base"
        ),
    ]
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report.to_json()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1.0, 0.01])
def test_every_row_is_what_the_files_say(tmp_path: Path, dtype: str, size: float) -> None:
    base = make_tiny(tmp_path / "base", num_hidden_layers=1, dtype=dtype)
    # gate_proj of an expert is written with zeros for up and down; q and the router alone.
    adapted, factors = random_factors(
        LoRAConfig(rank=3, target_modules=["q_proj", "gate_proj", "gate"]), base
    )
    for name, factor in factors.items():
        if ".lora_B." in name:
            factors[name] = size * factor
    (tmp_path / "adapter").mkdir()
    write_adapter(
        tmp_path / "adapter", adapted, model_shape(read_hf_config(base)), factors, str(base)
    )
    report = merge(tmp_path / "adapter", str(base), tmp_path / "out")
    in_float64 = cast(torch.float64)
    before = in_float64(read(base))
    after = in_float64(read(tmp_path / "out"))
    rows = {m.module: m for m in report.modules}
    # q, the router, and all three projections of 8 experts, which PEFT and vLLM need in the file.
    assert len(rows) == len(report.modules) == 1 + 1 + 3 * 8
    for a in adapted:
        for module in a.hf_modules():
            row = rows.pop(module)
            kept = after[f"{module}.weight"] - before[f"{module}.weight"]
            a_factor, b_factor = factors_of(factors, module)
            delta = a.scale * b_factor.double() @ a_factor.double()
            assert row.dtype == dtype and row.delta == pytest.approx(delta.norm().item(), rel=1e-5)
            # The part of what was added that points along the delta.
            survived = ((kept * delta).sum() / delta.square().sum()).item()
            assert row.survived == pytest.approx(survived, rel=1e-5)
            # delta's own rounding is within 1e-6 of it; float32's step is 2^-24 of a weight that is
            # 5 or 500 times larger.
            error = ((kept - delta).norm() / delta.norm()).item()
            assert row.error == pytest.approx(error, rel=0.05, abs=1e-6)
            if dtype == "float32":
                assert row.survived == pytest.approx(1, abs=1e-5)
                assert 0 < row.error < 1e-4
            elif size == 1:
                assert row.error > 2e-3
            else:
                # A delta of 0.002 of a weight is less than bfloat16's step of 2^-8.
                assert row.error > 0.3
                assert row.survived < 0.95
    # What is left are the projections that nobody trained.
    for module in rows.values():
        assert (module.dtype, module.delta) == (dtype, 0.0)
        assert (module.survived, module.error) == (None, None)
    assert {projection(m) for m in rows} == {"mlp.experts.*.up_proj", "mlp.experts.*.down_proj"}
    # Columns: dtype, modules, zero, survived (lowest, mean), error (largest, mean).
    lines = {}
    for line in report.text().splitlines():
        name, *columns = line.split()
        lines[name] = columns
    assert lines["mlp.experts.*.up_proj"] == [dtype, "8", "8", "-", "-", "-", "-"]
    assert lines["mlp.gate"][:3] == [dtype, "1", "-"]
    assert "16 modules" in report.text()
    assert ("changed by more than 10%" in report.text()) == (dtype == "bfloat16" and size < 1)


def test_dtypes_are_told_apart() -> None:
    """Bases keep some layers in float32, whose deltas survive whole whatever becomes of others."""
    modules = (
        MergedModule("model.layers.0.mlp.experts.3.up_proj", "float32", 1.0, 1.0, 1e-7),
        MergedModule("model.layers.11.mlp.experts.40.up_proj", "bfloat16", 1.0, 0.98, 0.05),
        MergedModule("lm_head", "float32", 1.0, 1.0, 1e-7),
    )
    report = MergeReport(Path("adapter"), "org/base", Path("/out"), 61_000_000_000, modules)
    first, _, *rows = report.text().splitlines()
    assert first == "adapter merged into org/base: 3 modules, 61.000 GB in /out"
    # A row per projection and dtype.
    assert [row.split()[:3] for row in rows] == [
        ["mlp.experts.*.up_proj", "float32", "1"], ["mlp.experts.*.up_proj", "bfloat16", "1"],
        ["lm_head", "float32", "1"],
    ]  # fmt: skip
