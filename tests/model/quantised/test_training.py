"""A training step from a quantised folder is the same step on the decoded plain folder, in every
layout; and what cannot be done with such a folder is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megalora.adapters.merge import merge
from megalora.cli.main import main
from megalora.config import LoRAConfig
from megalora.model.account import open_folder
from megalora.model.base_weights import BaseWeights
from megalora.train.loop import train
from megalora.verify.stock_model import load_stock
from tests.distributed.ranks import run_ranks
from tests.oracles import quantised as oracle
from tests.oracles.base import TOKENS, make_base, own_logits, transformers_logits
from tests.oracles.bitsandbytes_apart import write_in_own_process
from tests.parity.runs import make_config, records

SIZES: dict[str, Any] = {
    "hidden_size": 64, "moe_intermediate_size": 192, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4,
}  # fmt: skip
"""At ETP 2 a rank has 96 of 192 features: a cut inside fp8's first block."""
LORA = LoRAConfig(rank=4, alpha=12.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", **SIZES)


def both(base: Path, out: Path, form: str) -> tuple[Path, Path]:
    """The base quantised, and decoded again into a plain folder."""
    values = oracle.quantise_folder(base, out / "quantised", form)
    read = BaseWeights(open_folder(out / "quantised"))
    for name, value in values.items():
        # The library's own values, which may be rounded to bfloat16; ours are not.
        assert torch.equal(read[name].to(value.dtype), value)
        values[name] = read[name]
    return out / "quantised", oracle.plain_folder(base, out / "plain", values)


def outcome(base: Path, chats: Path, out: Path, parallel: dict[str, int]) -> dict[str, Any]:
    """Losses and gradient norms of two steps, and the adapter."""
    world = parallel["tp"] * parallel.get("pp", 1)
    config = make_config(base, chats, out, parallel, lora=LORA, steps=2, eval=4, check_base="layer")
    run_ranks(train, world, config)
    return {
        "loss": records(out, "loss"),
        "grad norm": records(out, "grad_norm"),
        "adapter": load_file(out / "step_000002/adapter_model.safetensors"),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any], limit: float) -> None:
    for key in ("loss", "grad norm"):
        assert one[key] == pytest.approx(other[key], rel=limit) and len(one[key]) == 2
    assert one["adapter"].keys() == other["adapter"].keys()
    for name, factor in one["adapter"].items():
        # Two steps of 1e-3 each move a factor.
        assert (factor - other["adapter"][name]).abs().max() <= limit, name


LAYOUT = {"tp": 2, "ep": 2, "etp": 1}


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=[] if form == "fp8" else pytest.mark.slow) for form in oracle.FORMS],
)
def test_01_a_step_is_that_of_the_decoded_folder(
    base: Path, chats: Path, tmp_path: Path, form: str
) -> None:
    """Experts and attention; the check before step 1 compares both bases with transformers."""
    quantised, plain = both(base, tmp_path, form)
    ours = outcome(quantised, chats, tmp_path / "ours", LAYOUT)
    assert_same(ours, outcome(plain, chats, tmp_path / "theirs", LAYOUT), 1e-6)


@pytest.mark.slow
def test_02_every_layout_has_the_same_base(base: Path, chats: Path, tmp_path: Path) -> None:
    """Cuts inside blocks too: rounding of sums is all that differs."""
    quantised, _ = both(base, tmp_path, "fp8")
    one = outcome(quantised, chats, tmp_path / "one", {"tp": 1})
    for number, layout in enumerate(({"tp": 2, "etp": 2}, LAYOUT, {"tp": 2, "pp": 2, "ep": 2})):
        other = outcome(quantised, chats, tmp_path / str(number), layout)
        assert_same(other, one, 1e-4)


@pytest.mark.parametrize("form", ["fp8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_03_logits_are_those_of_the_values(base: Path, tmp_path: Path, form: str) -> None:
    """By stock transformers on the library's values, and through ``load_stock``, which ``verify``,
    ``chat`` and the check of the first loss use."""
    values = oracle.quantise_folder(base, tmp_path / "quantised", form)
    plain = oracle.plain_folder(base, tmp_path / "plain", values)
    if form != "fp8":
        # bitsandbytes rounded them to bfloat16; in float32 ours are not rounded.
        plain = both(base, tmp_path / "again", form)[1]
    expected = transformers_logits(plain)
    with torch.no_grad():
        stock = load_stock(tmp_path / "quantised", torch.float32).eval()(TOKENS).logits
    assert torch.equal(stock, expected)
    assert (own_logits(tmp_path / "quantised") - expected).abs().max() <= 1e-5
    # What transformers makes of the ragged fp8 folder itself is another model, without a word.
    if form == "fp8":
        silent = transformers_logits(tmp_path / "quantised")
        assert (silent - expected).abs().max() > 1e-3


def test_08_merging_wants_the_original(base: Path, chats: Path, tmp_path: Path) -> None:
    from tests.adapters.merging import train as train_adapter

    quantised, plain = both(base, tmp_path, "fp8")
    adapter = train_adapter(base, tmp_path / "adapter", LORA).folder
    with pytest.raises(ValueError, match=r"is quantised \(fp8 in blocks of 128 x 128\)"):
        merge(adapter, str(quantised), tmp_path / "out")
    with pytest.raises(ValueError, match="--original: .* is quantised itself"):
        merge(adapter, str(quantised), tmp_path / "out", str(quantised))
    with pytest.raises(ValueError, match="--original: .* is not quantised; leave it out"):
        merge(adapter, str(plain), tmp_path / "out", str(base))
    other = make_base(tmp_path / "other", **SIZES | {"num_experts": 8})
    # Of the same sizes, with other weights.
    same = make_base(tmp_path / "same", **SIZES, seed=1)
    with pytest.raises(ValueError, match="--original: .* has other values than"):
        merge(adapter, str(quantised), tmp_path / "out", str(same))
    with pytest.raises(ValueError, match="--original: .* has other sizes than"):
        merge(adapter, str(quantised), tmp_path / "out", str(other))
    report = merge(adapter, str(quantised), tmp_path / "out", str(base))
    merge(adapter, str(base), tmp_path / "direct")
    made, wanted = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "direct"))
    assert made.keys() == wanted.keys()
    for name, tensor in made.items():
        assert torch.equal(tensor, wanted[name])
    assert "whose weights differ by the error of quantising them" in report.notes[0]


@pytest.mark.slow
def test_04_a_folder_that_transformers_and_bitsandbytes_wrote(base: Path, tmp_path: Path) -> None:
    """Attention in nf4; transformers 5 leaves experts plain, without a word, and stacked."""
    write_in_own_process(base, tmp_path / "written")
    values = tmp_path / "written/values.safetensors"
    theirs = load_file(values)
    values.unlink()
    opened = open_folder(tmp_path / "written")
    quantised = {name for name, place in opened.places.items() if place.quantised}
    assert len(quantised) == 2 * 4 and all(".self_attn." in name for name in quantised)
    assert quantised == theirs.keys()
    read = BaseWeights(opened)
    for name, value in theirs.items():
        assert torch.equal(read[name], value), name


def test_plan_counts_plain_weights_and_says_so(
    base: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle.quantise_folder(base, tmp_path / "quantised", "int4")
    said = {}
    for folder in (base, tmp_path / "quantised"):
        config = tmp_path / "config.yaml"
        config.write_text(
            f"model: {{path: {folder}}}\ndata: {{train: {chats}, max_length: 64}}\n"
            f"train: {{steps: 2, global_batch_size: 4, lr: 1.0e-3}}\n"
            f"checkpoint: {{dir: {tmp_path}/run}}\n"
        )
        main(["plan", str(config), "--gpus", "1", "--gpu", "h100"])
        said[folder] = capsys.readouterr().out.replace(str(folder), "FOLDER").splitlines()
    plain, quantised = said.values()
    (note,) = [line for line in quantised if line not in plain]
    assert note == (
        "the base is quantised (compressed-tensors' int4): its weights are decoded as they are read"
        " and take the memory of bfloat16"
    )
    # Every other line is that of the plain base.
    assert [line for line in quantised if line != note] == plain
