"""Pitfalls 5, 6, 9 and 10: what a file says to those who read it. Stock transformers + PEFT stands
for the server."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig, ParallelConfig, RunConfig
from megalora.lora.select import plan
from megalora.lora.spec import Adapted
from megalora.tiny import make_tiny
from megalora.verify.peft import verify_peft
from tests.distributed.ranks import run_ranks
from tests.parity.built import built, random_factors, whole_adapter
from tests.parity.everything import LORA, config_of

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Linears of attention and of MLPs; the last three are the experts' too."""


def export(folder: Path, base: Path, lora: LoRAConfig, factors: dict[str, Tensor]) -> Path:
    shape, adapted = plan(lora, ParallelConfig(), base)
    folder.mkdir()
    write_adapter(folder, adapted, shape, factors, str(base))
    return folder


def load_and_export(config: RunConfig, adapter: Path, out: Path) -> None:
    """Read a PEFT folder into this layout's shards and write it again."""
    with built(config, adapter / WEIGHTS) as run:
        whole = whole_adapter(run)
        # Rank 0 alone has the whole tensors, and writes.
        if whole is not None:
            out.mkdir()
            write_adapter(out, run.model.adapted, run.model.shape, whole, config.model.path)


def tagged(adapted: list[Adapted], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gate holds +e, up -e; every other tensor holds the number of its row and column, q, k and v
    apart by thousands."""
    number = {"q_proj": 1, "k_proj": 2, "v_proj": 3}
    tags = {}
    for name, tensor in factors.items():
        module = name.split(".lora_")[0]
        rows = torch.arange(float(tensor.shape[0]))
        columns = torch.arange(float(tensor.shape[1]))
        # Sums of powers of two, which float32 holds exactly: any swap of two places shows.
        place = rows[:, None] / 8 + columns / 1024 + 1000 * number.get(module.rsplit(".", 1)[-1], 0)
        # Dense linears are expert 0, so that routed expert 0 is told from them.
        expert = 0
        if ".experts." in module:
            expert = int(module.split(".experts.")[1].split(".")[0]) + 1
        sign = -1 if module.endswith("up_proj") else 1
        tags[name] = sign * (10000 * expert + place)
    return tags


def test_05_gate_up_and_q_k_v_keep_their_order_through_any_layout(
    everything, chats, tmp_path
) -> None:
    """One rank, then TP 2 x ETP 2, then TP 4 (two ranks for each KV head) x EP 4: three files of
    the same bits."""
    lora = replace(LORA, target_modules=MODULES)
    _, adapted = plan(lora, ParallelConfig(), everything)
    _, factors = random_factors(lora, everything)
    folder = export(tmp_path / "0", everything, lora, tagged(adapted, factors))
    original = load_file(folder / WEIGHTS)
    # The model has 12 query heads over 2 KV heads: at TP 4 a KV head lies on two ranks.
    layouts: list[tuple[int, dict[str, int]]] = [
        (1, {}),
        (2, {"tp": 2, "etp": 2}),
        (4, {"tp": 4, "ep": 4}),
    ]
    # Each layout reads what the one before it wrote.
    for i, (world, parallel) in enumerate(layouts, 1):
        config = config_of(everything, chats, tmp_path / "unused", parallel, lora)
        run_ranks(load_and_export, world, config, folder, tmp_path / str(i))
        folder = tmp_path / str(i)
        again = load_file(folder / WEIGHTS)
        assert again.keys() == original.keys()
        for name, tensor in original.items():
            assert torch.equal(again[name], tensor), (parallel, name)
        assert (folder / CONFIG).read_text() == (tmp_path / "0" / CONFIG).read_text()


def load(base: Path, adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()


@pytest.mark.parametrize("expert_size", [80, 96], ids=["in differs from out", "in equals out"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
def test_06_stock_peft_has_every_expert_s_own_delta(expert_size, use_rslora, tmp_path) -> None:
    """Where in equals out a transposed or shuffled stack loads without a word: compare each
    expert's merged weight."""
    base = make_tiny(tmp_path / "base", num_hidden_layers=1, moe_intermediate_size=expert_size)
    lora = LoRAConfig(rank=3, alpha=12.0, use_rslora=use_rslora)
    _, factors = random_factors(lora, base)
    before = load(base).model.layers[0].mlp.experts
    merged = (
        load(base, export(tmp_path / "adapter", base, lora, factors))
        .merge_and_unload()
        .model.layers[0]
        .mlp.experts
    )
    # transformers stacks gate above up, ``[E, 2 * inner, hidden]``; our files have them apart.
    gate_up = merged.gate_up_proj - before.gate_up_proj
    deltas = {
        "gate_proj": gate_up[:, :expert_size],
        "up_proj": gate_up[:, expert_size:],
        "down_proj": merged.down_proj - before.down_proj,
    }
    for projection, of_experts in deltas.items():
        for expert, delta in enumerate(of_experts):
            stem = f"base_model.model.model.layers.0.mlp.experts.{expert}.{projection}.lora"
            # alpha / r, or alpha / sqrt(r) with rslora.
            scale = 12.0 / (3**0.5 if use_rslora else 3)
            expected = scale * factors[f"{stem}_B.weight"] @ factors[f"{stem}_A.weight"]
            # A delta is the difference of two stored weights, each rounded at 6e-8 of its value.
            torch.testing.assert_close(delta, expected, rtol=0, atol=1e-6)


def moe_output(model: Any, tokens: Tensor) -> Tensor:
    """What the experts of layer 0 add, ``[S, H]``."""
    found: list[Tensor] = []
    # PEFT puts a prefix before the module's name.
    [name] = [name for name, _ in model.named_modules() if name.endswith("layers.0.mlp")]
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda _m, _i, out: found.append(out))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return found[0].flatten(0, -2)


def test_09_an_adapter_on_one_expert_changes_the_tokens_of_that_expert_alone(
    tiny, tmp_path
) -> None:
    lora = LoRAConfig(rank=3, alpha=12.0, target_modules=MODULES[4:], layers=[0])
    _, factors = random_factors(lora, tiny)
    of_five = {}
    for name, t in factors.items():
        # B of zeros everywhere else: the adapters of the other experts add nothing.
        acts = ".experts.5." in name or ".lora_A." in name
        of_five[name] = t if acts else torch.zeros_like(t)
    tokens = torch.arange(7, 67)[None]
    base = load(tiny)
    adapted = load(tiny, export(tmp_path / "adapter", tiny, lora, of_five))
    hidden: list[Tensor] = []
    hook = base.model.layers[0].mlp.register_forward_pre_hook(
        lambda _m, args: hidden.append(args[0])
    )
    before = moe_output(base, tokens)
    hook.remove()
    logits = hidden[0].flatten(0, -2) @ base.model.layers[0].mlp.gate.weight.T
    # top_k of the tiny model is 3
    to_five = (logits.topk(3).indices == 5).any(-1)
    # Otherwise the comparison below would hold for an adapter that acts everywhere or nowhere.
    assert 0 < to_five.sum() < len(to_five)
    changed = (moe_output(adapted, tokens) - before).abs().amax(-1) > 1e-6
    assert torch.equal(changed, to_five)


def test_09_an_adapter_that_does_nothing_is_not_verified(tiny, tmp_path) -> None:
    lora = LoRAConfig(rank=3, alpha=12.0, target_modules=MODULES)
    _, factors = random_factors(lora, tiny)
    acts = export(tmp_path / "acts", tiny, lora, factors)
    assert verify_peft(acts, str(tiny), atol=1e-4).ok
    # As a checkpoint before the first step has it: the factors are there, and B A is zero.
    without_b = {}
    for name, factor in factors.items():
        without_b[name] = factor if ".lora_A." in name else torch.zeros_like(factor)
    zeros = export(tmp_path / "zeros", tiny, lora, without_b)
    report = verify_peft(zeros, str(tiny), atol=1e-4)
    assert not report.ok and "the adapter does nothing" in report.text()
    save_file({}, acts / WEIGHTS)
    with pytest.raises(ValueError, match="holds no tensors: nothing was adapted"):
        verify_peft(acts, str(tiny), atol=1e-4)


def test_10_merged_and_unmerged_differ_by_rounding_alone(tiny, tmp_path) -> None:
    """Float32: logits of about 4 after sums of 96 to 192 terms, each rounded once more or once
    less."""
    lora = LoRAConfig(rank=3, alpha=12.0, target_modules=MODULES)
    adapter = export(tmp_path / "adapter", tiny, lora, random_factors(lora, tiny)[1])
    tokens = torch.arange(7, 67)[None]
    with torch.no_grad():
        unmerged = load(tiny, adapter)(tokens).logits
        merged = load(tiny, adapter).merge_and_unload()(tokens).logits
        # Adapters that do nothing would be equal merged and unmerged.
        assert (unmerged - load(tiny)(tokens).logits).abs().max() > 0.1
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-4)
