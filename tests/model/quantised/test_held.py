"""Weights that stay codes in memory have the values of the decoded plain folder on every rank, bit
for bit, train as it does, and take the bytes that the planner says."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megalora_kernels.backend import MAX_TRITON_RANK
from torch import Tensor

from megalora.config import LoRAConfig, ModelConfig, ParallelConfig, RunConfig
from megalora.config.train import Relora
from megalora.fake_world import fake_world
from megalora.hf.json_file import read_hf_config
from megalora.lora.adapted_model import with_held
from megalora.lora.factor_checks import KERNEL_RANK
from megalora.lora.select import plan
from megalora.model.account import open_folder
from megalora.model.base_weights import BaseWeights
from megalora.model.build import build_model
from megalora.model.formats import ALL_PLAIN
from megalora.model.formats.coded import double_of
from megalora.model.held import held_in, held_of, rounded_names
from megalora.model.held_codes import HeldCodes
from megalora.model.held_loading import held_modules
from megalora.model.quantised.to_nf4 import quantise, quantise_scales, rounded
from megalora.parallel import parallel_groups
from megalora.planner.dryrun import dry_run
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import DECODED, memory_of
from megalora.planner.models import held_by_config, shape_in
from megalora.planner.workload import Workload
from megalora.train.held_check import HeldCheck
from megalora.train.held_notes import notes_of_base
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.model.quantised.test_training import LORA, SIZES, assert_same, both
from tests.oracles import quantised as oracle
from tests.oracles.base import make_base, rewrite, stored_tensors
from tests.oracles.bitsandbytes_apart import functional
from tests.parity.runs import make_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain base of values that bfloat16 has, as published models are."""
    folder = make_base(tmp_path_factory.mktemp("base") / "base", **SIZES)
    return rewrite(folder, lambda tensors: {n: t.bfloat16().float() for n, t in tensors.items()})


def test_codes_and_scales_are_those_of_bitsandbytes() -> None:
    g = torch.Generator().manual_seed(0)
    w = (torch.randn(96, 192, generator=g) * 0.02).bfloat16()
    # A block of zeros, and a value between two codes.
    w[0, :64] = 0
    w[1, :2] = torch.tensor([1.0, (0.07958029955625534 + 0.16093020141124725) / 2])
    bnb = functional()
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    codes, absmax = quantise(w)
    # bitsandbytes has the first of two codes in the high nibble.
    both_nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1)
    assert torch.equal(codes.flatten(), both_nibbles.flatten())
    assert torch.equal(absmax.flatten(), state.absmax)


def test_scales_as_codes_are_those_of_bitsandbytes() -> None:
    g = torch.Generator().manual_seed(0)
    # The last of 24 blocks of 256 scales is short.
    w = (torch.randn(500, 768, generator=g) * (1 + torch.rand(500, 1, generator=g))).bfloat16()
    w[0] = 0
    stored, values = oracle.nf4_doubly(w.float())
    made = quantise_scales(quantise(w)[1])
    assert torch.equal(made.codes.flatten(), stored["weight.absmax"])
    assert torch.equal(made.scales, stored["weight.nested_absmax"])
    assert torch.equal(rounded(w, doubly=True), values)
    assert not torch.equal(rounded(w), values)
    # Its code for CPUs has neighbours of a few codes.
    on_cpu = oracle.nf4(w, nested=True)[0]["weight.absmax"].int()
    distance = (made.codes.flatten().int() - on_cpu).abs()
    assert distance.max() <= 1 and distance.float().mean() < 0.005


def test_others_read_the_values_that_are_trained_on(base: Path) -> None:
    """Transformers' side of ``verify``, ``eval`` and ``chat``."""
    config = ModelConfig(path=str(base), weight_format="nf4_double", quantised_parts="experts")
    plain = stored_tensors(base)
    experts = {name for name in plain if ".experts." in name}
    read = BaseWeights(open_folder(base), nf4=rounded_names(config, base))
    for name, weight in read.items():
        is_expert = name in experts
        expected = oracle.nf4_doubly(plain[name])[1] if is_expert else plain[name]
        assert torch.equal(weight, expected), name


def compare(quantised: Path, plain: Path, layout: dict[str, int], weight_format: str) -> list[str]:
    """Modules of this rank that are codes, each of whose values is compared."""
    parallel = ParallelConfig(**layout)
    with parallel_groups(parallel):
        opened = open_folder(quantised)
        shape = opened.shape
        config = ModelConfig(
            path=str(quantised),
            dtype="float32",
            weight_format=weight_format,  # type: ignore
        )
        held = held_in(config, opened)
        assert held is not None
        formats = with_held(ALL_PLAIN, held, shape, parallel)
        coded = build_model(config, parallel, shape, quantised, formats=formats)
        as_plain = replace(config, weight_format="plain")
        wanted = build_model(as_plain, parallel, shape, plain)
        check = HeldCheck(coded)
        found = []
        for layer, module, codes in held_modules(coded, shape):
            # Layers of a stage are counted from its first one.
            layers = wanted[0].decoder.layers  # pyright: ignore
            (its,) = [one for one in layers if one.layer_number - 1 == layer]
            weight = its.get_parameter(module if ".experts." in module else f"{module}.weight")
            values = codes.decoded() if ".experts." in module else codes.decoded()[0]
            assert torch.equal(values, weight), f"{module} of layer {layer}"
            if held.nested:
                # Where that saves nothing scales are float32: parts of 192 of 384 columns.
                assert (codes.how.double is None) == ("down" in module and parallel.etp == 2)
            found.append(module)
        # As Megatron's Float16Module does.
        for chunk in coded:
            chunk.bfloat16()
        check.run()
        spoil(coded)
        with pytest.raises(RuntimeError, match=r"the codes of 1 of \d+ frozen weights are not"):
            check.run()
        return found


def spoil(chunks: list[Any]) -> None:
    """Change one scale by its last bit."""
    for module in chunks[0].modules():
        if isinstance(module, HeldCodes):
            module.scale_bits.view(-1)[-1] += 1
            return


# Cuts inside blocks of fp8 (96 of 192 rows and columns) and of nf4 (96 columns), pipeline stages,
# experts on two ranks.
@pytest.mark.parametrize(
    ("form", "layout", "world"),
    [
        ("fp8", {"tp": 2, "etp": 2}, 2),
        ("nf4", {"tp": 2, "etp": 1, "ep": 2}, 2),
        ("plain", {"tp": 2, "etp": 2}, 2),
        ("nf4 nested", {"tp": 2, "etp": 1}, 2),
        ("plain doubly", {"tp": 2, "etp": 2}, 2),
        pytest.param("nf4 nested", {"tp": 2, "etp": 2, "pp": 2}, 4, marks=pytest.mark.slow),
    ],
)
def test_values_of_every_part(
    base: Path, tmp_path: Path, form: str, layout: dict[str, int], world: int
) -> None:
    if form in ("nf4 nested", "plain doubly"):
        # 384 columns: ends of blocks of 16,384 elements divide rows.
        sizes = SIZES | {"moe_intermediate_size": 384}
        base = make_base(tmp_path / "base", **sizes)
    weight_format = "auto"
    if form == "plain doubly":
        linears = {n: t for n, t in stored_tensors(base).items() if oracle.is_linear(n)}
        values = {name: oracle.nf4_doubly(tensor)[1] for name, tensor in linears.items()}
        quantised, plain = base, oracle.plain_folder(base, tmp_path / "plain", values)
        weight_format = "nf4_double"
    else:
        quantised, plain = both(base, tmp_path, "nf4" if form == "plain" else form)
    if form == "plain":
        quantised = base
        weight_format = "nf4"
    for found in run_ranks(compare, world, quantised, plain, layout, weight_format):
        # Two layers, each with two fused weights of experts and two of attention.
        assert len(found) == 2 * 4 // layout.get("pp", 1)
        assert len(set(found)) == 4


# Second scales for rows, for parts of a row, and cut; none where they save nothing.
@pytest.mark.parametrize(
    ("columns", "part", "double"),
    [
        (2048, (768, 2048), (8, 32, 768)),
        (2048, (12, 2048), (4, 32, 12)),
        (768, (2048, 768), (1, 4, 2048)),
        (768, (2048, 384), (1, 2, 2048)),
        (4096, (2048, 1024), (4, 16, 2048)),
        (192, (64, 192), None),
        (128, (64, 32), None),
    ],
)
def test_places_of_second_scales(columns: int, part: Any, double: Any) -> None:
    """No group of weights with one second scale in memory lies in two of the file's."""
    found = double_of(columns, part)
    assert found == double
    if found is None:
        return
    # A part in the middle of its matrix, in rows and in columns.
    row = torch.arange(part[0], 2 * part[0])
    first = part[1] if part[1] < columns else 0
    block = torch.arange(first, first + part[1], 64)
    second = (row[:, None] * columns + block) // (64 * 256)
    groups = second.unflatten(0, (-1, found.rows)).unflatten(2, (-1, found.scales))
    assert torch.equal(groups.amin((1, 3)), groups.amax((1, 3)))


@pytest.mark.slow
def test_a_plain_base_trains_as_its_nf4_values(base: Path, chats: Path, tmp_path: Path) -> None:
    """DoRA and recomputation, with the comparison of layers before step 1; and the codes are not
    written to."""
    _, plain = both(base, tmp_path, "nf4")
    lora = replace(LORA, use_dora=True)
    found = []
    for folder, how in ((base, {"weight_format": "nf4"}), (plain, {})):
        out = tmp_path / f"run{len(found)}"
        config = make_config(
            folder, chats, out, {"tp": 2, "etp": 2}, "full",
            lora=lora, steps=2, eval=4, check_base="layer",
        )  # fmt: skip
        config = replace(config, model=replace(config.model, **how))
        run_ranks(train, 2, config)
        found.append(out)
    assert_same(*(read(out) for out in found), 1e-6)


def read(out: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    from tests.parity.runs import records

    adapter: dict[str, Tensor] = load_file(out / "step_000002/adapter_model.safetensors")
    return {
        "loss": records(out, "loss"), "grad norm": records(out, "grad_norm"), "adapter": adapter,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("weight_format", "parts", "layout", "rank"),
    [
        ("nf4", "linears", {"tp": 2, "pp": 2, "ep": 2}, 3),
        ("nf4", "experts", {"ep": 4}, 0),
        ("nf4_double", "linears", {"tp": 2, "pp": 2, "ep": 2}, 3),
        # Doubly quantised, as config.json says.
        ("auto", "linears", {"tp": 2, "pp": 2, "ep": 2}, 3),
    ],
)
def test_the_plan_is_what_is_built(
    base: Path, weight_format: Any, parts: Any, layout: dict[str, int], rank: int
) -> None:
    hf = read_hf_config(base)
    if weight_format == "auto":
        hf |= {"quantization_config": oracle.CONFIGS["nf4 nested"]()}
    model = ModelConfig(path=str(base), weight_format=weight_format, quantised_parts=parts)
    parallel = ParallelConfig(**layout)
    with fake_world(rank, 4):
        built = dry_run(hf, LORA, parallel, model)
    held = held_by_config(model, hf)
    assert held is not None and held.nested == (weight_format != "nf4")
    work = Workload(sequence_length=64, global_batch_size=64, held=held)
    shape = open_folder(base).shape
    stage = rank // (4 // parallel.pp)
    said = memory_of(shape, LORA, ParallelLayout(parallel=parallel, num_ranks=4), work, stage)
    assert built.base_bytes == said["weights"]
    assert built.scratch_bytes == said[DECODED]
    without = memory_of(
        shape, LORA, ParallelLayout(parallel=parallel, num_ranks=4),
        replace(work, held=None), stage,
    )  # fmt: skip
    assert without["weights"] > said["weights"]


def test_what_would_be_quantised_anew_is_refused(base: Path) -> None:
    shape = open_folder(base).shape
    config = ModelConfig(path="base", weight_format="fp8")
    with pytest.raises(ValueError, match="weight_format=fp8, and the weights of base are plain"):
        held_of(config, None, shape)
    scheme = held_scheme("awq")
    with pytest.raises(ValueError, match="quantised as awq: they would be quantised anew"):
        held_of(replace(config, weight_format="nf4"), scheme, shape)
    # Decoded, as before.
    assert held_of(replace(config, weight_format="auto"), scheme, shape) is None
    assert held_of(replace(config, weight_format="plain"), held_scheme("fp8"), shape) is None


def test_servers_of_a_base_that_is_quantised_here_are_said(base: Path, chats: Path) -> None:
    config = make_config(base, chats, base / "run", {}, lora=LoRAConfig(rank=2))
    url = ["http://127.0.0.1:8000"]

    def said(weight_format: Any, servers: list[str]) -> bool:
        model = replace(config.model, weight_format=weight_format)
        # Not through the section's checks: which objective samples is none of the note's business.
        rl = SimpleNamespace(servers=servers, start_servers=None)
        asked: Any = SimpleNamespace(model=model, train=config.train, rl=rl)
        return any("rl.servers have the base as" in note for note in notes_of_base(asked, base))

    assert said("nf4", url) and not said("nf4", []) and not said("auto", url)


def test_a_model_without_the_formats_that_its_config_asks_for_is_refused(base: Path) -> None:
    """Built with plain weights in place of nf4's, it would compute with other values."""
    config = ModelConfig(path=str(base), dtype="float32", weight_format="nf4")
    shape = open_folder(base).shape
    said = "holds mlp.experts.down of layer 0 as nf4 codes, and the formats"
    # Before anything is made: there is no world here.
    with pytest.raises(ValueError, match=said):
        build_model(config, ParallelConfig(), shape, base)
    held = held_in(config, open_folder(base))
    assert held is not None
    formats = dict(with_held(ALL_PLAIN, held, shape, ParallelConfig()))
    # Dense linears of one layer alone.
    formats[1] = formats[1]._replace(linears={})
    with pytest.raises(ValueError, match=r"holds self_attention.\w+ of layer 1"):
        build_model(config, ParallelConfig(), shape, base, formats=formats)


def held_scheme(form: Any) -> Any:
    from megalora.model.quantised.scheme import Scheme

    return Scheme(form=form, title=form, block=(128, 128))


def test_cycles_are_not_merged_into_codes(base: Path, chats: Path, tmp_path: Path) -> None:
    coded = tmp_path / "fp8"
    oracle.quantise_folder(base, coded, "fp8")
    config = make_config(coded, chats, tmp_path / "run", {}, lora=LoRAConfig(rank=2), steps=5)
    config = replace(config, train=replace(config.train, relora=Relora(every=2, warmup=0)))
    assert any("So nothing is merged" in note for note in notes_of_base(config, coded))

    def planned(config: RunConfig) -> set[int]:
        _, adapted = plan(config.lora, config.parallel, coded, config.train, model=config.model)
        assert shape_in(config).kept_cycles == adapted[0].kept
        return {a.product_rank for a in adapted}

    # Those of two cycles beside the third one.
    assert planned(config) == {6}
    # Values in the model's dtype are merged into.
    plain = replace(config, model=replace(config.model, weight_format="plain"))
    assert planned(plain) == {2}
    assert not any("relora" in note for note in notes_of_base(plain, coded))
    refused = (
        ({"lora": replace(config.lora, dropout=0.1)}, "set lora.dropout=0, got 0.1"),
        # Gate and up are stacked: 3 x 2 x 22.
        ({"lora": replace(config.lora, rank=22)}, "a rank of 132 .* above the 128 of the kernels"),
        ({"train": replace(config.train, steps=None, epochs=3)}, "fp8 .* needs train.steps"),
    )
    for change, message in refused:
        with pytest.raises(ValueError, match=message):
            planned(replace(config, **change))
    assert planned(replace(config, lora=replace(config.lora, rank=21))) == {63}
    assert KERNEL_RANK == MAX_TRITON_RANK
    # From the plain base they are quantised anew, and a line says so.
    made = replace(config, model=replace(config.model, weight_format="nf4"))
    (note,) = [note for note in notes_of_base(made, base) if "relora" in note]
    assert "A checkpoint's adapter, their sum, is for the base quantised without them" in note
