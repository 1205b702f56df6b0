"""Write adapters of every registered family: stock PEFT, our reader and merge compute what was
trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel

from megalora.adapters.merge import merge
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.write.engines import check_engine, loads_in_peft
from megalora.config import LoRAConfig
from megalora.lora.select import resolve
from megalora.model.families import FAMILIES, layer_projections
from megalora.tiny import make_tiny
from megalora.verify.peft import verify_peft
from tests.adapters.adapters import Trained, load_base, logits, merged_by_hand, train
from tests.adapters.stock import ATOL, shape_of
from tests.peft_warnings import IGNORED

pytestmark = IGNORED

Layout = Literal["per_expert", "stacked"]


def options_of(base: Path) -> dict[str, Any]:
    """Every linear that stock PEFT can adapt, but the head; q and the gates of MLPs have ranks of
    their own."""
    shape = shape_of(base)
    names = set()
    ranks = {"q_proj": 3}
    for layer in range(shape.num_layers):
        for projection in layer_projections(shape, layer):
            names.add(projection.name)
            # By role, because Mixtral calls it w1.
            if projection.role == "gate_proj":
                ranks[projection.name] = 2
    names -= FAMILIES[shape.model_type].peft.not_honoured.keys()
    return {"rank": 4, "alpha": 12.0, "target_modules": sorted(names), "rank_pattern": ranks}


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_what_was_trained_is_what_others_compute(arch: str, layout: Layout, tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", arch=arch)
    shape = shape_of(base)
    # Nothing to stack in a dense model.
    if layout == "stacked" and not shape.moe_layers:
        return
    trained = train(base, tmp_path / "adapter", layout=layout, **options_of(base))
    expected = logits(merged_by_hand(trained))
    # Logits that are compared below may differ by ATOL, 3e-5.
    moved = (expected - logits(load_base(base))).abs().max()
    assert moved > 0.5

    read = read_adapter(trained.folder, shape)
    # Three ways back: our reader, stock PEFT, and merged weights in plain transformers.
    again = Trained(base, shape, read.adapted, read.tensors, trained.folder)
    torch.testing.assert_close(logits(merged_by_hand(again)), expected, rtol=0, atol=ATOL)
    if loads_in_peft(layout, trained.adapted, shape):
        model = PeftModel.from_pretrained(load_base(base), str(trained.folder)).eval()
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=ATOL)
    merge(trained.folder, str(base), tmp_path / "merged")
    torch.testing.assert_close(logits(load_base(tmp_path / "merged")), expected, rtol=0, atol=ATOL)


def test_a_router_that_stock_peft_cannot_wrap_is_refused_by_name(tmp_path: Path) -> None:
    # transformers reads the router's bias through the module, which PEFT's wrapper does not have.
    base = make_tiny(tmp_path / "base", arch="glm4_moe", num_hidden_layers=2)
    trained = train(base, tmp_path / "adapter", target_modules=["gate", "q_proj"])
    way_out = "adapter of gate.* fails at the first forward pass. Export with --drop gate"
    with pytest.raises(ValueError, match=way_out):
        check_engine("peft", "stacked", trained.adapted, trained.shape)
    with pytest.raises(ValueError, match=way_out):
        verify_peft(trained.folder, str(base), atol=1e-3)


@pytest.mark.parametrize("engine", ["peft", "vllm"])
def test_what_an_engine_leaves_out_of_a_family_is_refused(
    engine: Literal["peft", "vllm"], tiny_dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["qwen3"]
    # A made-up restriction, so that the test does not hang on what an engine does today.
    said = replace(getattr(family, engine), not_honoured={"k_proj": "drops it"})
    monkeypatch.setitem(FAMILIES, "qwen3", replace(family, **{engine: said}))
    shape = shape_of(tiny_dense)
    adapted = resolve(LoRAConfig(rank=2), shape)
    with pytest.raises(ValueError, match="does not honour the adapter of k_proj.*it drops it"):
        check_engine(engine, "per_expert", adapted, shape)
