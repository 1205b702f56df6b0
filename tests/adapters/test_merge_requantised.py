"""Merging into a quantised base in its own form: what is written is what its library would write
of ``W + s B A``, and a delta that rounds away is an error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.adapters.merge_requantised import merge_requantised
from megalora.cli.main import main
from megalora.config import LoRAConfig
from megalora.model.account import open_folder
from megalora.model.base_weights import BaseWeights
from tests.adapters.merging import Trained
from tests.adapters.merging import train as train_adapter
from tests.model.quantised.test_training import SIZES
from tests.oracles import quantised as oracle
from tests.oracles.base import make_base, rewrite, stored_tensors

SMALL = 0.15
"""Of the random factors: deltas of about 0.03 of their weights."""
LORA = LoRAConfig(rank=4, alpha=12.0, target_modules=["o_proj", "up_proj", "down_proj", "gate"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain base of values that bfloat16 has, as published models are."""
    folder = make_base(tmp_path_factory.mktemp("base") / "base", **SIZES)
    return rewrite(folder, lambda tensors: {n: t.bfloat16().float() for n, t in tensors.items()})


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter", LORA, SMALL)


def wanted(base: Path, adapter: Trained) -> dict[str, Tensor]:
    """Weight's name -> the original's value with the delta, in float32."""
    plain = BaseWeights(open_folder(base))
    found: dict[str, Tensor] = {}
    for module, _, delta, _ in adapter.linears():
        found[f"{module}.weight"] = plain[f"{module}.weight"].float() + delta.float()
    return found


@pytest.mark.parametrize("form", ["fp8", "fp8, e8m0 scales", "nf4", "nf4 nested"])
def test_08_from_the_original_a_delta_survives(
    base: Path, adapter: Trained, tmp_path: Path, form: str
) -> None:
    quantised, out = tmp_path / "quantised", tmp_path / "out"
    oracle.quantise_folder(base, quantised, form)
    report = merge_requantised(adapter.folder, str(quantised), out, str(base))
    before, after = stored_tensors(quantised), stored_tensors(out)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    read = BaseWeights(open_folder(out))
    merged = wanted(base, adapter)
    for name, value in merged.items():
        # The router is stored plain.
        if name.endswith("gate.weight"):
            assert torch.allclose(read[name], value, atol=1e-6)
            continue
        _check_form(form, name, value, read, after)
    # Whatever is not adapted has the bytes that it had.
    for name, tensor in before.items():
        module = name.split("_proj")[0] + "_proj.weight"
        if module not in merged and name not in merged:
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    zero = [row for row in report.modules if row.survived is None]
    # Experts' gate_proj, of which files have zeros beside an adapted up_proj.
    assert len(zero) == 8 and all(row.module.endswith("gate_proj") for row in zero)
    for row in report.modules:
        assert row.survived is None or 0.9 <= row.survived <= 1.1, row


def _check_form(
    form: str, name: str, value: Tensor, read: BaseWeights, after: dict[str, Tensor]
) -> None:
    """A matrix is what its library would have written, or within the error of its form."""
    # e8m0 scales are rounded up here and to the nearest by the oracle; a nested absmax keeps the
    # folder's offset. Relative errors of the facts: fp8 0.026, nf4 0.092.
    error = (read[name] - value).norm() / value.norm()
    assert error < (0.06 if form.startswith("fp8") else 0.11), name
    if form == "fp8":
        parts, values = oracle.fp8(value)
        scale = f"{name}_scale_inv"
        assert torch.equal(after[scale], parts["weight_scale_inv"])
        assert torch.equal(read[name], values)
    if form == "nf4":
        parts, _ = oracle.nf4(value)
        # A sum that float32 and float64 round apart may fall on the other side of a bound.
        same = (after[name] == parts["weight"]).float().mean()
        assert same > 0.999, name


@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_08_less_than_nine_tenths_is_an_error(
    base: Path, adapter: Trained, tmp_path: Path, form: str
) -> None:
    """From decoded weights, which lie on the grid already."""
    quantised, out = tmp_path / "quantised", tmp_path / "out"
    oracle.quantise_folder(base, quantised, form)
    with pytest.raises(ValueError, match=r"of [\d,]+ of 28 deltas less than 0.9 would survive"):
        merge_requantised(adapter.folder, str(quantised), out)
    assert not out.exists()
    folders = [str(adapter.folder), "--base", str(quantised), "--out", str(out)]
    main(["merge", *folders, "--requantise", "--allow-loss"])
    said = json.loads((out / "merge_report.json").read_text())
    survived = {row["module"]: row["survived"] for row in said["modules"]}
    assert len(survived) == 28
    # By definition, from both folders.
    before, after = (BaseWeights(open_folder(folder)) for folder in (quantised, out))
    for module, _, delta, _ in adapter.linears():
        kept = (after[f"{module}.weight"] - before[f"{module}.weight"]).double()
        ratio = (kept * delta).sum() / (delta * delta).sum()
        assert survived[module] == pytest.approx(ratio.item(), abs=1e-3)
    # The router is stored plain, and the experts' gate_proj is not adapted.
    coded = [value for module, value in survived.items() if "gate" not in module]
    # The facts' table says 0.04 and 0.82 at this size.
    lost = [value for value in coded if value is not None and value < 0.9]
    assert len(lost) > len(coded) / 2
    assert min(lost) < (0.1 if form == "nf4" else 0.85)


def test_what_is_not_written_is_refused(base: Path, adapter: Trained, tmp_path: Path) -> None:
    def refused(folder: Path, said: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=said):
            merge_requantised(adapter.folder, str(folder), tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused(base, "--requantise: .* is not quantised; leave it out")
    oracle.quantise_folder(base, tmp_path / "awq", "awq")
    refused(tmp_path / "awq", r"writes fp8 and nf4, and .* is AWQ's int4 \(gemm\)")
    oracle.quantise_folder(base, tmp_path / "fp8", "fp8")
    other = make_base(tmp_path / "other", **SIZES, seed=1)
    refused(tmp_path / "fp8", "--original: .* has other values than", original=str(other))
