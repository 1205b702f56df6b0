"""Train adapters that are initialised from the base weights (PiSSA, OLoRA), beside stock PEFT's."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalora.adapters.export import export
from megalora.adapters.files import CARD, WEIGHTS, read_config
from megalora.adapters.inspect import describe
from megalora.adapters.merge import merge
from megalora.adapters.write.form import write_adapter
from megalora.config import CheckpointConfig, LoRAConfig, RunConfig
from megalora.config.train import Relora
from megalora.hf.json_file import read_hf_config
from megalora.hf.tensor_names import PEFT_PREFIX
from megalora.lora.base_factors import factorised
from megalora.lora.select import resolve
from megalora.model.fields import model_shape
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.lora.shapes import refusal
from tests.oracles.base import TOKENS, make_base, rewrite, stored_tensors, transformers_logits
from tests.parity.built import adapter_of, built, whole_adapter
from tests.parity.compare import distance, of_largest
from tests.parity.everything import first_batch
from tests.parity.gradients import reduced_gradients
from tests.parity.models import ADAPTERS, SIZES
from tests.parity.runs import make_config, records

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA = LoRAConfig(rank=4, alpha=12.0, target_modules=ATTENTION)
INITS = [
    "pissa",
    pytest.param("pissa_niter_16", marks=pytest.mark.slow),
    pytest.param("olora", marks=pytest.mark.slow),
]
LR = 1e-3
EPS = 1e-5
"""As in the grid of layouts: with Adam's usual eps rounding takes a whole step where a gradient is
next to nothing."""
STEPS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers whose attention has singular values far apart: of two that are almost equal the
    vectors are a matter of rounding."""
    folder = make_base(tmp_path_factory.mktemp("models") / "spread", **SIZES)
    return rewrite(folder, spread)


def spread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of attention with the singular values 4, 2.4, 1.44 and so on."""
    for name, weight in tensors.items():
        if ".self_attn." in name and weight.dim() == 2:
            u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
            values = 4 * 0.6 ** torch.arange(len(s))
            tensors[name] = (u @ (values[:, None] * vt)).float()
    return tensors


@dataclass
class Trained:
    """What three steps on the same batch came to, by tensor name."""

    start: dict[str, Tensor]
    losses: list[float]
    gradients: dict[str, Tensor]
    """Of the first step."""
    after: dict[str, Tensor]


def peft_model(base: Path, lora: LoRAConfig) -> Any:
    """Stock PEFT's model with such an adapter on attention, float32."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, experts_implementation="eager"
    )
    options: dict[str, Any] = {"init_lora_weights": lora.init, "use_rslora": lora.use_rslora}
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=ATTENTION, **options)
    return get_peft_model(model, config)


def of_peft(base: Path, init: str, batch: list[Any]) -> Trained:
    """Three steps by stock PEFT, in float64 behind its start, which it has in float32 alone."""
    model = peft_model(base, replace(LORA, init=init)).double()
    factors = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in factors.items()}
    optimizer = torch.optim.AdamW(factors.values(), lr=LR, eps=EPS, weight_decay=0.0)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = mean_loss(model, batch)
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in factors.items()}
        torch.nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    after = {name: p.detach() for name, p in factors.items()}
    return Trained(start, losses, gradients, after)


def mean_loss(model: Any, samples: list[Any]) -> Tensor:
    """Mean over the target tokens of all samples, each of which runs alone."""
    losses: list[Tensor] = []
    for sample in samples:
        ids = torch.tensor(sample.input_ids).long()
        logprobs = model(ids[None, :-1]).logits[0].log_softmax(-1)
        own = logprobs.gather(1, ids[1:, None])[:, 0]
        losses.append(-own[torch.tensor(sample.loss_mask[1:])])
    return torch.cat(losses).mean()


def three_steps(config: RunConfig) -> Trained | None:
    """On the ranks of a layout; a rank function."""
    with built(config) as run:
        # No key of a config sets eps.
        for group in run.optimizer.param_groups:
            group["eps"] = EPS
        start = whole_adapter(run)
        run.stepper.train(run.batches.of_step(0), run.optimizer)
        gradients = reduced_gradients(run.model, run.optimizer)
        losses = [run.step(0, LR)[0] for _ in range(STEPS)]
        after = whole_adapter(run)
        if start is None or after is None or gradients is None:
            return None
        return Trained(start, losses, gradients, after)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"tp": 2, "ep": 2}),
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(2, {"pp": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"ep": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 4, "ep": 4}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "pp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_is_that_of_stock_peft(
    init: str, world: int, parallel: dict[str, int], base: Path, chats: Path, tmp_path: Path
) -> None:
    expected = of_peft(base, init, first_batch(base, chats))
    config = make_config(base, chats, tmp_path, parallel, lora=replace(LORA, init=init), lr=LR)
    found: Trained = run_ranks(three_steps, world, config)[0]
    signs: dict[str, Tensor] = {}
    for name, value in expected.start.items():
        signs[name] = signs_of(found.start[frozen_name(name)], value)

    def turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * signs[name] for name, value in tensors.items()}

    begun = {name: found.start[frozen_name(name)] for name in expected.start}
    assert of_largest(begun, turned(expected.start)) <= 1e-5
    for name, value in begun.items():
        assert not found.start[name].any()
        assert torch.equal(found.after[frozen_name(name)], value)
    assert len(found.start) == 2 * len(begun) == 32
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert of_largest(found.gradients, turned(expected.gradients)) <= 1e-5
    for name, value in turned(expected.after).items():
        assert distance(begun[name] + found.after[name], value) <= 1e-5, name
        # Each of three steps moves by the learning rate.
        assert distance(begun[name] + found.after[name], begun[name]) > LR


def frozen_name(name: str) -> str:
    """Name of the frozen factor that belongs to the difference of this name."""
    return name.replace(".lora_A.", ".lora_A0.").replace(".lora_B.", ".lora_B0.")


def signs_of(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 or -1 for each rank, which runs along the shorter dimension of a factor."""
    dim = 0 if ours.shape[0] == LORA.rank else 1
    return (ours * theirs).sum(1 - dim, keepdim=True).sign()


@pytest.fixture(scope="module")
def trained(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, on attention."""
    out = tmp_path_factory.mktemp("runs") / "begun"
    lora = replace(LORA, init="pissa")
    run_ranks(train, 2, make_config(base, chats, out, {"tp": 2, "ep": 2}, lora=lora, steps=2))
    return out / "step_000002"


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def in_peft(base: Path, folder: Path, dtype: torch.dtype) -> Tensor:
    """Logits of stock PEFT with the folder, on the base as published."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, experts_implementation="eager")
    return logits_of(PeftModel.from_pretrained(model, str(folder)).to(dtype))


@pytest.mark.parametrize("use_rslora", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("init", ["olora", pytest.param("pissa", marks=pytest.mark.slow)])
def test_a_file_on_the_published_base_is_what_peft_has_on_its_own(
    init: str, use_rslora: bool, base: Path, chats: Path, tmp_path: Path
) -> None:
    lora = replace(LORA, init=init, use_rslora=use_rslora)
    model = peft_model(base, lora).double()
    # As after some training: far from the start.
    generator = torch.Generator().manual_seed(3)
    shape = model_shape(read_hf_config(base))
    adapted = resolve(lora, shape)
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                own = name.replace(".default", "")
                tensors[frozen_name(own)] = p.float().clone()
                tensors[own] = 0.1 * torch.randn(p.shape, generator=generator)
                p += tensors[own]
    write_adapter(tmp_path, adapted, shape, tensors, str(base))
    config = read_config(tmp_path)
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    expected = logits_of(model)
    torch.testing.assert_close(in_peft(base, tmp_path, torch.float64), expected, rtol=0, atol=1e-5)
    assert (expected - transformers_logits(base)).abs().max() > 0.1


@pytest.mark.slow
def test_a_checkpoint_is_exported_merged_and_described(
    trained: Path, base: Path, tmp_path: Path
) -> None:
    export(trained, tmp_path / "out", engine="vllm")
    merge(trained, str(base), tmp_path / "merged")
    found = in_peft(base, tmp_path / "out", torch.float32)
    torch.testing.assert_close(transformers_logits(tmp_path / "merged"), found, rtol=0, atol=2e-5)
    assert (found - transformers_logits(base)).abs().max() > 1e-3
    card = (tmp_path / "out" / CARD).read_text()
    assert "Initialised from the base weights: pissa." in card and "--max-lora-rank 8" in card
    assert "lora.init=pissa: A holds A0 + dA and dA" in describe(trained)


@pytest.mark.parametrize(
    ("parallel", "rest"),
    [
        pytest.param({}, {"tp": 2, "ep": 2}, marks=pytest.mark.slow),
        pytest.param({"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_in_another_layout(
    parallel: dict[str, int], rest: dict[str, int], tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """From the saved pair: with another seed one iteration finds other factors."""
    lora = replace(ADAPTERS["begun"], init="pissa_niter_1")
    config = make_config(tiny, chats, tmp_path / "whole", parallel, lora=lora, steps=3)
    checkpoint = CheckpointConfig(dir=str(tmp_path / "whole"), every=2)
    run_ranks(train, 4 if "tp" in parallel else 1, replace(config, checkpoint=checkpoint))
    other = make_config(tiny, chats, tmp_path / "rest", rest, lora=lora, steps=3, seed=7)
    resume = CheckpointConfig(
        dir=str(tmp_path / "rest"), resume=str(tmp_path / "whole/step_000002")
    )
    run_ranks(train, 2, replace(other, checkpoint=resume))
    found = records(tmp_path / "rest", "loss")
    assert found == pytest.approx(records(tmp_path / "whole", "loss")[2:], rel=3e-6)
    whole = load_file(tmp_path / "whole/step_000003" / WEIGHTS)
    for name, tensor in load_file(tmp_path / "rest/step_000003" / WEIGHTS).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_another_start_is_another_run(
    trained: Path, base: Path, chats: Path, tmp_path: Path
) -> None:
    lora = replace(LORA, init="olora")
    config = make_config(base, chats, tmp_path, {}, lora=lora, steps=3)
    resume = CheckpointConfig(dir=str(tmp_path), resume=str(trained))
    with pytest.raises(Exception, match="lora.init=pissa, this run has olora"):
        run_ranks(train, 1, replace(config, checkpoint=resume))


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        pytest.param(4, {"tp": 2, "ep": 2, "etp": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 4, "ep": 2, "etp": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"pp": 2, "vpp": 1, "ep": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_linear_begins_as_its_own_weight(
    world: int, parallel: dict[str, int], everything: Path, chats: Path, tmp_path: Path
) -> None:
    """Of each expert, a shared expert, a dense layer and the router, by QR, which nearly equal
    singular values do not disturb."""
    names = [*ATTENTION, "gate_proj", "up_proj", "down_proj", "gate"]
    lora = LoRAConfig(rank=3, target_modules=names, init="olora")
    config = make_config(everything, chats, tmp_path, parallel, lora=lora)
    start: dict[str, Tensor] = run_ranks(adapter_of, world, config)[0]
    weights = stored_tensors(everything)
    modules = {name.removeprefix(PEFT_PREFIX).split(".lora_")[0] for name in start}
    # Attention of two layers, a router, a shared and eight routed experts, a dense MLP.
    assert len(modules) == 4 * 2 + 1 + 3 + 3 * 8 + 3
    for module in modules:
        q, r = torch.linalg.qr(weights[f"{module}.weight"].double())
        signs = r.diagonal()[:3].sign()
        for factor, wanted in (("A", r[:3] * signs[:, None]), ("B", q[:, :3] * signs)):
            found = start[f"{PEFT_PREFIX}{module}.lora_{factor}0.weight"]
            assert distance(found, wanted) <= 1e-5, (module, factor)
            assert not start[f"{PEFT_PREFIX}{module}.lora_{factor}.weight"].any()


def test_a_converted_folder_of_peft_is_read_and_the_other_one_refused(
    base: Path, tmp_path: Path
) -> None:
    model = peft_model(base, replace(LORA, init="pissa"))
    model.save_pretrained(tmp_path / "as trained")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    expected = logits_of(model)
    model.peft_config["default"].init_lora_weights = "pissa"
    start = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
    model.save_pretrained(tmp_path / "converted", **start)
    merge(tmp_path / "converted", str(base), tmp_path / "merged")
    found = transformers_logits(tmp_path / "merged")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="init_lora_weights=.pissa. .*changed the base model too"):
        merge(tmp_path / "as trained", str(base), tmp_path / "wrong")


def test_what_cannot_be_beside_it_is_refused(tiny: Path, chats: Path, tmp_path: Path) -> None:
    for option in ("use_dora", "share_outer"):
        with pytest.raises(ValueError, match=rf"lora.init=pissa is not there with lora.{option}"):
            LoRAConfig(init="pissa", **{option: True})
    for wrong in ("pisa", "pissa_niter_0", "pissa_niter_", "gaussian"):
        with pytest.raises(ValueError, match=rf"lora.init must be lora, pissa, .* got {wrong}$"):
            LoRAConfig(init=wrong)
    config = make_config(tiny, chats, tmp_path, {}, lora=replace(LORA, init="olora"))
    with pytest.raises(ValueError, match=r"lora.init=olora: train.relora begins anew"):
        replace(config, train=replace(config.train, relora=Relora(every=1)))
    with pytest.raises(ValueError, match=r"lora.init=olora: train.ema_decay averages"):
        replace(config, train=replace(config.train, ema_decay=0.9))
    with pytest.raises(ValueError, match=r"lora.init=olora: train.weight_decay=0.01 would decay"):
        replace(config, train=replace(config.train, weight_decay=0.01))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": [*ATTENTION, "lm_head"]}, "lm_head cannot be initialised so"),
        ({"rank": 41}, "mlp.experts.*.gate_proj is 40 x 96 and has no 41 singular values"),
        ({"dropout": 0.1}, "mlp.experts.*.gate_proj needs lora.dropout=0, got 0.1"),
    ],
)
def test_linears_that_cannot_begin_so_are_named(options: dict[str, Any], words: str) -> None:
    message = refusal(init="pissa", **options)
    assert words in message and "\n" not in message


@pytest.mark.parametrize(("rows", "columns"), [(40, 24), (24, 40)])
def test_factors_are_those_of_the_definition(rows: int, columns: int) -> None:
    u, _ = torch.linalg.qr(torch.randn(rows, 24, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, 24, dtype=torch.float64))
    values = 3 * 0.6 ** torch.arange(24)
    weight = ((u * values) @ v.T).float()
    for init in ("pissa", "pissa_niter_16"):
        a, b = factorised(weight, 5, 4.0, init, torch.Generator().manual_seed(0))
        # s B A is the weight's largest part, shared out evenly.
        part = (u[:, :5] * values[:5]) @ v[:, :5].T
        torch.testing.assert_close(4 * (b @ a).double(), part, rtol=0, atol=3e-6)
        torch.testing.assert_close(a.square().sum(1), b.square().sum(0), rtol=1e-5, atol=0)
        assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
    a, b = factorised(weight, 5, 4.0, "olora", torch.Generator())
    torch.testing.assert_close(b.T @ b, torch.eye(5), rtol=0, atol=1e-6)
    # The first columns of W are those of Q R alone.
    torch.testing.assert_close((b @ a)[:, :5], weight[:, :5], rtol=0, atol=1e-6)
    assert (a.diagonal() > 0).all()
