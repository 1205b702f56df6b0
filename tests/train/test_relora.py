"""Periodic merges: cycles against a float64 restart, the merged base to one rounding, the sum as
one adapter, resumption, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from megalora.adapters.cycles import cycle_file, save_cycle, summed
from megalora.adapters.inspect import describe
from megalora.config import CheckpointConfig, LoRAConfig, ObjectiveConfig, RunConfig, TrainConfig
from megalora.config.train import Relora
from megalora.data.order import global_batch_indices
from megalora.data.splits import load_split, split_off_eval
from megalora.lora.init import initial_a
from megalora.lora.refold import bare
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted, tensor_name
from megalora.model.held_codes import HeldCodes
from megalora.tiny import make_tiny
from megalora.train.assemble import Run
from megalora.train.loop import train
from megalora.train.optim import learning_rate
from megalora.train.relora import Cycles
from tests.distributed.ranks import run_ranks
from tests.oracles.training import Oracle, Trained, read_adapter
from tests.parity.base_formats import decoded_folder, make_folders, read_folder
from tests.parity.built import built, random_factors
from tests.parity.case import (
    EPS,
    LIMITS,
    LR,
    Expected,
    deviations,
    exceeded,
    prepare_run,
    read_run,
    start_factors,
    train_recording_gradients,
)
from tests.parity.grid import EVAL, Case
from tests.parity.models import make_model, shape_of
from tests.parity.runs import make_config, records

STEPS = 5
RELORA = Relora(every=2)
"""Two merges in ``STEPS``, the second in the middle of Adam's third count to 2."""
LIMITS_OF_RESTARTS = {**LIMITS, "gradient": 6e-5}
"""A's gradient is B times something, and behind a merge B is a first step of Adam from zero, of
which entries with small gradients hang on their rounding: 1.3e-5 in one process."""
LAYOUTS = [
    Case(2, tp=2, ep=2, adapter="ranks"),
    pytest.param(Case(1, adapter="ranks", recompute="full"), marks=pytest.mark.slow),
    pytest.param(Case(4, pp=2, vpp=2, etp=2, adapter="ranks"), marks=pytest.mark.slow),
    pytest.param(Case(4, cp=2, tp=2, ep=2, etp=2, adapter="ranks"), marks=pytest.mark.slow),
    pytest.param(
        Case(4, pp=2, ep=2, adapter="ranks", recompute="selective"), marks=pytest.mark.slow
    ),
    # Nothing is merged into a folder's codes.
    Case(2, tp=2, ep=2, adapter="ranks", base="fp8"),
    pytest.param(
        Case(4, pp=2, vpp=2, etp=2, adapter="ranks", base="fp8", recompute="selective"),
        marks=pytest.mark.long,
    ),
]


class Merging(Oracle):
    """Plain transformers in float64 that merges its adapter and begins another one."""

    @torch.no_grad()
    def begin_next(self, cycle: int, seed: int, adapted: list[Adapted]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, weight in self.merged().items():
            parameters[name].copy_(weight)
        for a in adapted:
            for module in a.hf_modules():
                fresh = initial_a(seed, module, a.rank, a.in_features, cycle)
                self.factors[tensor_name(module, "A")] = fresh.double().requires_grad_()
                b = self.factors[tensor_name(module, "B")]
                self.factors[tensor_name(module, "B")] = torch.zeros_like(b).requires_grad_()


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> Any:
    """``reference`` of plain bases and of codes, each made once."""
    found: dict[str, tuple[Path, Expected]] = {}

    def get(how: str) -> tuple[Path, Expected]:
        if how not in found:
            found[how] = reference(how, tmp_path_factory.mktemp("relora"), chats)
        return found[how]

    return get


def reference(how: str, folder: Path, chats: Path) -> tuple[Path, Expected]:
    """The base, and three cycles of the oracle, which merges into the values that the base's codes
    mean. They depend on no layout."""
    case = Case(1, adapter="ranks")
    base = make_model(case.model, folder / "base")
    if how != "plain":
        make_folders(base, how)
    config, _ = prepare_run(case, STEPS, base, chats, base.parent / "unused", "float32", 0)
    split = load_split(str(chats), AutoTokenizer.from_pretrained(base), format="auto", **case.data)
    train_split, eval_split = split_off_eval(split, EVAL, 0)
    adapted, factors = start_factors(config.lora, base, "float32")
    scales: dict[str, float] = {}
    for a in adapted:
        scales |= dict.fromkeys(a.hf_modules(), a.alpha / a.rank)
    oracle = Merging(decoded_folder(base, how), factors, scales)
    with torch.no_grad():
        eval_loss = oracle.loss(list(eval_split.samples)).item()
    cycles: list[Trained] = []
    for cycle, first in enumerate(range(0, STEPS, RELORA.every)):
        if cycle:
            oracle.begin_next(cycle, config.train.seed, adapted)
        batches = []
        for step in range(first, min(first + RELORA.every, STEPS)):
            indices = global_batch_indices(step, case.batch, len(train_split.samples), 0)
            batches.append([train_split.samples[i] for i in indices])
        cycles.append(oracle.train(batches, LR, clip=1.0, eps=EPS))
    whole = Trained(
        [loss for cycle in cycles for loss in cycle.losses],
        [norm for cycle in cycles for norm in cycle.norms],
        [gradients for cycle in cycles for gradients in cycle.gradients],
        cycles[-1].adapter,
        cycles[-1].exp_avg,
        cycles[-1].exp_avg_sq,
    )
    return base, Expected(eval_loss, whole, 0, oracle.margin)


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_cycles_in_every_layout(case: Case, references, chats: Path, tmp_path: Path) -> None:
    base, oracle = references(case.base)
    config, start = prepare_run(case, STEPS, base, chats, tmp_path, "float32", 0)
    config = replace(config, train=replace(config.train, relora=RELORA))
    run_ranks(train_recording_gradients, case.world, config, start, case.head)
    row = deviations(read_run(tmp_path), oracle)
    print(row)
    assert not exceeded(row, LIMITS_OF_RESTARTS), row


def folded(config: RunConfig, other: RunConfig, count: int) -> list[str]:
    """Names of weights of this rank that ``count`` merges make other than those of the base of
    ``other``; a rank function."""
    with built(config) as run:
        cycles = Cycles(run, None)
        cycles.count = count
        cycles.restore()
        ours = weights_of(run)
    with built(other) as run:
        theirs = weights_of(run)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def weights_of(run: Run) -> dict[str, Tensor]:
    """This rank's weights of the base by chunk and name."""
    found = {}
    with bare(run.model.chunks):
        for number, chunk in enumerate(run.model.chunks):
            for name, parameter in chunk.named_parameters():
                found[f"{number}.{name}"] = parameter.detach().clone()
            for name, module in chunk.named_modules():
                if isinstance(module, HeldCodes):
                    found[f"{number}.{name}"] = module.quantised.dequantised(torch.float32)
    return found


def cycles_of(lora: LoRAConfig, base: Path, run: Path, count: int) -> dict[str, Tensor]:
    """Save random cycles; returns the sum of their s B A by module, in float64."""
    total: dict[str, Tensor] = {}
    for cycle in range(count):
        adapted, factors = random_factors(lora, base, seed=cycle)
        factors = {name: factor.bfloat16() for name, factor in factors.items()}
        save_cycle(run, cycle, factors, factors.items())
        for a in adapted:
            for module in a.hf_modules():
                b, a_factor = (factors[tensor_name(module, f)].double() for f in ("B", "A"))
                total[module] = total.get(module, 0) + a.scale * b @ a_factor
    return total


def merged_base(base: Path, merged: Path, total: dict[str, Tensor], dtype: torch.dtype) -> Path:
    """The base with ``total`` added to its weights, which are rounded to ``dtype``."""
    left = dict(total)
    merged.mkdir()
    for path in base.iterdir():
        (merged / path.name).write_bytes(path.read_bytes())
        if path.suffix != ".safetensors":
            continue
        weights = load_file(path)
        for name, weight in weights.items():
            if (module := name.removesuffix(".weight")) in left:
                weights[name] = (weight.double() + left.pop(module)).to(dtype)
        save_file(weights, merged / path.name, metadata={"format": "pt"})
    assert not left, "an adapted weight is in no file"
    return merged


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(1, {}), pytest.param(4, {"tp": 2, "ep": 2, "pp": 2}, marks=pytest.mark.slow)],
    ids=["alone", "tp2-ep2-pp2"],
)
def test_ten_merges_round_once(
    world: int, parallel: dict[str, int], chats: Path, tmp_path: Path
) -> None:
    """The base in bfloat16 is round(base + sum of ten s B A), each computed in float64, bit for
    bit. Adding one after the other would have rounded ten times."""
    base = make_tiny(tmp_path / "base", arch="qwen2_moe", mlp_only_layers=[1])
    lora = LoRAConfig(rank=3, alpha=12.0, rank_pattern={"up_proj": 2})
    config = make_config(base, chats, tmp_path / "run", parallel, lora=lora, dtype="bfloat16")
    (tmp_path / "run").mkdir()
    total = cycles_of(lora, base, tmp_path / "run", 10)
    merged = merged_base(base, tmp_path / "merged", total, torch.bfloat16)
    other = replace(config, model=replace(config.model, path=str(merged)))
    assert run_ranks(folded, world, config, other, 10) == [[]] * world
    # The comparison sees weights: without merges they are others.
    assert len(run_ranks(folded, world, config, other, 0)[0]) > 5


# Cuts inside blocks of nf4; scales of all of a matrix.
@pytest.mark.parametrize("how", ["nf4", pytest.param("nf4_double", marks=pytest.mark.slow)])
def test_merges_quantise_the_plain_base_anew(how: str, chats: Path, tmp_path: Path) -> None:
    """Values are those of a plain folder of base + sum of s B A that is quantised as it is read,
    bit for bit."""
    base = make_tiny(tmp_path / "base", moe_intermediate_size=384)
    lora = LoRAConfig(rank=3, alpha=12.0, rank_pattern={"up_proj": 2})
    config = make_config(base, chats, tmp_path / "run", {"tp": 2, "etp": 2}, lora=lora)
    config = replace(config, model=replace(config.model, weight_format=how))
    (tmp_path / "run").mkdir()
    total = cycles_of(lora, base, tmp_path / "run", 3)
    other = merged_base(base, tmp_path / "merged", total, torch.float32)
    other = replace(config, model=replace(config.model, path=str(other)))
    assert run_ranks(folded, 2, config, other, 3) == [[]] * 2
    assert len(run_ranks(folded, 2, config, other, 2)[0]) > 5


@pytest.mark.slow
def test_ten_cycles_are_one_adapter_of_their_ranks(chats: Path, tmp_path: Path) -> None:
    """The last checkpoint's adapter on the base as published is what was trained."""
    base = make_tiny(tmp_path / "base")
    options: dict[str, Any] = {"steps": 11, "relora": Relora(every=1), "lr": 3e-3}
    config = make_config(base, chats, tmp_path / "run", {"tp": 2, "ep": 2}, **options)
    run_ranks(train, 2, config)
    split = load_split(str(chats), AutoTokenizer.from_pretrained(base), format="auto",
                       max_length=256)  # fmt: skip
    _, held_out = split_off_eval(split, 21, 0)
    adapter = read_adapter(tmp_path / "run/step_000011")
    ranks = {len(t) for name, t in adapter.items() if ".lora_A." in name}
    assert ranks == {11 * config.lora.rank}
    assert "the sum of 11 adapters" in describe(tmp_path / "run/step_000011")
    written = json.loads((tmp_path / "run/step_000011/adapter_config.json").read_text())
    oracle = Oracle(base, adapter, written["lora_alpha"] / written["r"])
    with torch.no_grad():
        expected = oracle.loss(list(held_out.samples)).item()
    losses = records(tmp_path / "run", "eval_loss")
    assert losses[-1] == pytest.approx(expected, rel=3e-6)
    assert losses[-1] < 0.99 * losses[0], "nothing was learned that could be lost"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("half_way", "how"),
    [(2, "plain"), (3, "plain"), (3, "fp8")],
    ids=["before a merge", "within a cycle", "beside codes"],
)
def test_resuming_at_another_layout(half_way: int, how: str, chats: Path, tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base")
    if how != "plain":
        make_folders(base, how)
        base = read_folder(base, how)
    options: dict[str, Any] = {
        "steps": STEPS, "relora": Relora(every=2, warmup=1), "schedule": "linear",
    }  # fmt: skip
    whole = make_config(base, chats, tmp_path / "whole", {}, **options)
    run_ranks(train, 1, whole)
    half = make_config(base, chats, tmp_path / "half", {"tp": 2, "ep": 2}, **options)
    every = CheckpointConfig(dir=str(tmp_path / "half"), every=half_way, keep=0)
    run_ranks(train, 2, replace(half, checkpoint=every))
    saved = tmp_path / f"half/step_{half_way:06d}"
    again = CheckpointConfig(dir=str(tmp_path / "again"), resume=str(saved))
    resumed = make_config(base, chats, tmp_path / "again", {"pp": 2}, **options)
    run_ranks(train, 2, replace(resumed, checkpoint=again))
    name = f"step_{STEPS:06d}/adapter_model.safetensors"
    expected = load_file(tmp_path / "whole" / name)
    found = load_file(tmp_path / "again" / name)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        torch.testing.assert_close(found[tensor], value, rtol=1e-3, atol=3e-6)
    # The checkpoint has all that a folder elsewhere needs, and the run keeps what it resumed from.
    assert cycle_file(tmp_path / "again", 1).is_file()
    without = make_config(base, chats, tmp_path / "without", {}, steps=STEPS, schedule="linear")
    other = CheckpointConfig(dir=str(tmp_path / "without"), resume=str(saved))
    with pytest.raises(Exception, match="train.relora"):
        run_ranks(train, 1, replace(without, checkpoint=other))


def test_the_sum_is_that_of_the_products() -> None:
    lora = LoRAConfig(rank=3, alpha=12.0, rank_pattern={"up_proj": 2}, target_modules=["up_proj"])
    generator = torch.Generator().manual_seed(0)
    adapted = resolve(lora, shape_of("dense"))
    parts = []
    for _ in range(3):
        part = {}
        for a in adapted:
            for factor in ("A", "B"):
                name = tensor_name(a.hf_module(), factor)
                part[name] = torch.randn(a.shape(factor), generator=generator)
        parts.append(part)
    whole, tensors = summed(adapted, parts[:-1], parts[-1])
    for a, of_sum in zip(adapted, whole, strict=True):
        a_name, b_name = (tensor_name(a.hf_module(), factor) for factor in ("A", "B"))
        expected = sum(a.scale * part[b_name] @ part[a_name] for part in parts)
        assert (of_sum.rank, of_sum.scale) == (6, of_sum.alpha / 6)
        torch.testing.assert_close(of_sum.scale * tensors[b_name] @ tensors[a_name], expected)


def test_the_rate_warms_up_behind_every_merge() -> None:
    config = TrainConfig(
        steps=12, lr=8.0, schedule="linear", warmup=2, relora=Relora(every=4, warmup=2)
    )
    plain = replace(config, relora=None)
    factors = []
    for step in range(12):
        factors.append(learning_rate(config, step, 12) / learning_rate(plain, step, 12))
    assert factors == [1, 1, 1, 1, 0.5, 1, 1, 1, 0.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relora": {"every": 0}}, "relora.every must be at least 1"),
        ({"relora": {"every": 4, "warmup": 4}}, "relora.warmup must be in"),
        ({"relora": {"every": 10}}, "nothing would ever be merged"),
    ],
)
def test_refused_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=10, relora=Relora(**options["relora"]))


def test_refused_together(tmp_path: Path, chats: Path) -> None:
    config = make_config(tmp_path, chats, tmp_path / "run", {}, relora=RELORA)
    with pytest.raises(ValueError, match="compares with the base, into which train.relora"):
        replace(config, objective=ObjectiveConfig(name="dpo"))
    with pytest.raises(ValueError, match="lora.share_outer: train.relora"):
        replace(config, lora=replace(config.lora, share_outer=True))
    served = replace(config.checkpoint, serve="http://localhost:8000")
    with pytest.raises(ValueError, match="checkpoint.serve: with train.relora"):
        replace(config, checkpoint=served)
