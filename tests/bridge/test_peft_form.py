"""The written folder in stock PEFT: logits equal those of a merge by hand, whatever was adapted and however."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megalora.bridge.peft import CONFIG, WEIGHTS, adapted_in, copy_adapter, export_form, read_config, write_adapter
from megalora.config import LoRAConfig
from megalora.lora.spec import Adapted, resolve, tensor_name
from megalora.model.shape import ModelShape, model_shape, read_hf_config
from megalora.tiny import make_tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT calls patterns unused that it does use
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]
LAYER_2_EXPERTS = r"layers\.2\.mlp\.experts\.\d+"
MOE_CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "ranks": {"target_modules": [*EXPERTS, "q_proj"],
              "rank_pattern": {"gate_proj": 2, "up_proj": 3, "down_proj": 5, "q_proj": 7}},
    "expert rank": {"expert_rank": 3},
    "alphas": {"alpha_pattern": {"gate_proj": 8.0, "up_proj": 3.0, "down_proj": 20.0, "o_proj": 2.5}},
    "ranks and alphas": {"rank_pattern": {"up_proj": 3, "k_proj": 6}, "alpha_pattern": {"up_proj": 5.0, "k_proj": 7.0}},
    "rslora": {"use_rslora": True},
    "rslora and ranks": {"use_rslora": True, "rank_pattern": {"up_proj": 3, "down_proj": 5, "v_proj": 7}},
    "layers": {"layers": [0, 2]},
    "layers and ranks": {"layers": "1-2", "rank_pattern": {"gate_proj": 2, "down_proj": 5}},
    "gate only": {"target_modules": ["gate_proj"]},
    "up only": {"target_modules": ["up_proj"], "layers": [3]},
    "down only": {"target_modules": ["down_proj"]},
    "gate and up": {"target_modules": ["gate_up_proj"]},
    "gate and down": {"target_modules": ["gate_proj", "down_proj"], "rank_pattern": {"down_proj": 6}},
    "attention": {"target_modules": ["qkv_proj", "o_proj"]},
    "lm_head": {"target_modules": ["lm_head", "down_proj"], "rank_pattern": {"lm_head": 3}},
    "router": {"target_modules": ["gate"]},
    "router among others": {"target_modules": ["gate", *ATTENTION, *EXPERTS], "rank_pattern": {"gate": 3},
                            "alpha_pattern": {"gate": 5.0}},
    "router by layer": {"target_modules": ["gate", "q_proj"], "rank_pattern": {r"layers\.1\.mlp\.gate": 3},
                        "alpha_pattern": {r"layers\.3\.mlp\.gate": 5.0}},
    "attention by layer": {"target_modules": ATTENTION, "rank_pattern": {r"layers\.2\.self_attn\.q_proj": 6},
                           "alpha_pattern": {r"layers\.[01]\.self_attn\.o_proj": 6.0}},
    "down by layer": {"target_modules": EXPERTS, "rank_pattern": {rf"{LAYER_2_EXPERTS}\.down_proj": 6},
                      "alpha_pattern": {r"layers\.1\.mlp\.experts\.\d+\.down_proj": 6.0}},
    "gate and up by layer": {"target_modules": EXPERTS, "rank_pattern": {rf"{LAYER_2_EXPERTS}\.gate_proj": 6},
                             "alpha_pattern": {rf"{LAYER_2_EXPERTS}\.up_proj": 6.0}},
    "gate in one layer, down in another": {"target_modules": [r"layers\.0\..*gate_proj", r"layers\.3\..*down_proj"]},
}  # fmt: skip
DENSE_CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "ranks and alphas": {"rank_pattern": {"gate_proj": 2, "up_proj": 3, "q_proj": 7},
                         "alpha_pattern": {"up_proj": 9.0}},
    "by layer, with lm_head": {"target_modules": [*EXPERTS, "lm_head"], "layers": "1-",
                               "rank_pattern": {r"layers\.2\.mlp\.down_proj": 6}},
}  # fmt: skip
MIXED_CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "expert rank": {"expert_rank": 3},
    "up only": {"target_modules": ["up_proj"]},
    "experts only": {"layers": [0, 2, 3]},
    "dense layer only": {"layers": [1]},
    "one projection of the dense layer": {"target_modules": ["up_proj", "q_proj"], "layers": [1],
                                          "rank_pattern": {"up_proj": 3}},
    "dense down and q": {"rank_pattern": {r"layers\.1\.mlp\.down_proj": 6, "q_proj": 5},
                         "alpha_pattern": {"down_proj": 5.0}},
}  # fmt: skip
SHARED_CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "shared, routed and dense differ": {"expert_rank": 3, "rank_pattern": {r"shared_expert\.(gate|up)_proj": 6},
                                        "alpha_pattern": {r"shared_expert\.down_proj": 5.0}},
    "shared expert only": {"target_modules": [r"shared_expert\..*_proj"]},
    "one projection of the shared expert": {"target_modules": [r"shared_expert\.up_proj", "v_proj"], "layers": [0, 2]},
    "rslora and router": {"target_modules": ["gate", *ATTENTION, *EXPERTS], "use_rslora": True},
}  # fmt: skip
TIED_CASES: dict[str, dict[str, Any]] = {"all": {}, "lm_head": {"target_modules": ["lm_head", "v_proj"]}}
BASES = {"moe": MOE_CASES, "dense": DENSE_CASES, "mixed": MIXED_CASES, "tied": TIED_CASES, "shared": SHARED_CASES}
CASES = [
    pytest.param(base, {"rank": 4, "alpha": 12.0, **options}, id=f"{base}: {name}")
    for base, cases in BASES.items()
    for name, options in cases.items()
]


@pytest.fixture(scope="module")
def bases(tiny: Path, tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    mixed = make_tiny(folder / "mixed", mlp_only_layers=[1])
    tied = make_tiny(folder / "tied", tie_word_embeddings=True, num_hidden_layers=2)
    shared = make_tiny(folder / "shared", arch="qwen2_moe", mlp_only_layers=[1], num_hidden_layers=3)
    return {"moe": tiny, "dense": tiny_dense, "mixed": mixed, "tied": tied, "shared": shared}


@pytest.fixture(autouse=True)
def peft_knows_qwen2_moe(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21 converts per-expert adapters for all that is built like Qwen2-MoE, but its table lacks that name itself."""
    monkeypatch.setitem(transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN, "qwen2_moe", "qwen2_moe")


@dataclass
class Trained:
    """An adapter as training leaves it, and the folder that export made of it."""

    base: Path
    shape: ModelShape
    adapted: list[Adapted]
    tensors: dict[str, Tensor]
    folder: Path

    def deltas(self) -> Iterator[tuple[Adapted, int | None, Tensor]]:
        """(adapted, expert, scale * B A) for every linear."""
        for a in self.adapted:
            for expert in range(a.num_experts) if a.num_experts else [None]:
                yield a, expert, a.scale * self.factor(a, expert, "B") @ self.factor(a, expert, "A")

    def factor(self, a: Adapted, expert: int | None, factor: Any) -> Tensor:
        return self.tensors[tensor_name(a.hf_module(expert), factor)]


def train(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Trained:
    shape = model_shape(read_hf_config(base))
    adapted = resolve(LoRAConfig(**options), shape)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for a in adapted:
        for module in a.hf_modules():
            a_factor, b_factor = (torch.randn(a.shape(f), generator=generator) for f in ("A", "B"))
            tensors[tensor_name(module, "A")] = (a_factor / a.in_features**0.5).to(dtype)
            tensors[tensor_name(module, "B")] = (0.2 * b_factor / (a.scale * a.rank**0.5)).to(dtype)
    folder.mkdir(exist_ok=True)
    write_adapter(folder, adapted, shape, tensors, str(base))
    return Trained(base, shape, adapted, tensors, folder)


def load_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def merged_by_hand(trained: Trained) -> Any:
    """transformers' own model with the deltas added to its weights; gate rows stand before up rows."""
    model = load_base(trained.base)
    for a, expert, delta in trained.deltas():
        if expert is None:
            linear = model.get_submodule(a.hf_module())
            linear.weight = nn.Parameter(linear.weight + delta)  # a new one: a tied embedding stays as it is
            continue
        experts, size = model.get_submodule(f"model.layers.{a.layer}.mlp.experts"), trained.shape.expert_intermediate
        rows = {"gate_proj": slice(0, size), "up_proj": slice(size, 2 * size)}
        weight = experts.down_proj[expert] if a.name == "down_proj" else experts.gate_up_proj[expert][rows[a.name]]
        weight += delta
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    tokens = torch.randint(512, (2, 23), generator=torch.Generator().manual_seed(7))
    return model(tokens).logits


@pytest.mark.parametrize(("base", "options"), CASES)
def test_stock_peft_computes_the_trained_model(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any]
) -> None:
    trained = train(bases[base], tmp_path / "adapter", **options)
    expected = logits(merged_by_hand(trained))
    effect = (expected - logits(load_base(trained.base))).abs().max()
    assert effect > 0.1, "an adapter without effect proves nothing"
    found = logits(PeftModel.from_pretrained(load_base(trained.base), str(trained.folder)).eval())
    # float32 through 4 layers errs by some 2^-24 * 100 of the largest logit, which is about 5.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_peft_as_it_is_refuses_qwen2_moe_experts_loudly(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, PEFT has learnt the name and README's remark can go."""
    monkeypatch.delitem(transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN, "qwen2_moe")
    trained = train(bases["shared"], tmp_path / "adapter", rank=4, alpha=12.0)
    with pytest.raises(ValueError, match="Make sure that this layer is not also targeted"):
        PeftModel.from_pretrained(load_base(trained.base), str(trained.folder))


@pytest.mark.parametrize(("base", "options"), CASES)
def test_the_folder_reads_back_as_what_was_trained(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any]
) -> None:
    trained = train(bases[base], tmp_path / "adapter", **options)
    tensors, again = load_file(trained.folder / WEIGHTS), adapted_in(trained.folder, trained.shape)
    read = Trained(trained.base, trained.shape, again, tensors, trained.folder)
    found = {a.hf_module(expert): delta for a, expert, delta in read.deltas()}
    for a, expert, delta in trained.deltas():
        torch.testing.assert_close(found.pop(a.hf_module(expert)), delta, rtol=1e-6, atol=1e-7)
    assert not any(delta.count_nonzero() for delta in found.values()), "what was added must do nothing"
    assert 2 * sum(len(a.hf_modules()) for a in again) == len(tensors)


@pytest.mark.parametrize(("base", "options"), CASES)
def test_experts_are_written_as_vllm_and_peft_need_them(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any]
) -> None:
    trained = train(bases[base], tmp_path / "adapter", **options)
    config, tensors = read_config(trained.folder), load_file(trained.folder / WEIGHTS)
    assert (config["use_rslora"], config["lora_dropout"], config["modules_to_save"]) == (False, 0.0, None)
    adapted_layers = {a.layer for a in trained.adapted if a.projection.is_expert}
    for layer in adapted_layers:
        for name in EXPERTS:
            ranks = {
                tensors[tensor_name(f"model.layers.{layer}.mlp.experts.{e}.{name}", "A")].shape[0]
                for e in range(trained.shape.num_experts)
            }
            assert ranks == {config["r"]} or (name == "down_proj" and len(ranks) == 1)
    others = {a.layer for a in trained.adapted} - adapted_layers
    assert not [name for name in tensors for layer in others if f"layers.{layer}.mlp.experts." in name]


def test_config_in_full(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=4, alpha=12.0, target_modules=[*EXPERTS, "q_proj", "v_proj", "gate"],
        use_rslora=True, rank_pattern={r"layers\.3\.self_attn\.v_proj": 16, "down_proj": 9, "up_proj": 1},
        alpha_pattern={"gate": 2.0},
    )  # fmt: skip
    assert json.loads((trained.folder / CONFIG).read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(bases["moe"]),
        "inference_mode": True, "r": 4, "lora_alpha": 24,  # 12 / sqrt(4) * 4
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
        "init_lora_weights": True, "modules_to_save": None, "target_parameters": None,
        "target_modules": ["down_proj", "gate", "gate_proj", "q_proj", "up_proj", "v_proj"],
        "rank_pattern": {"down_proj": 9, r"model\.layers\.3\.self_attn\.v_proj": 16},
        "alpha_pattern": {
            r"gate(\.weight)?": 4,  # 2 / sqrt(4) * 4
            "down_proj": 36,  # 12 / sqrt(9) * 9
            r"model\.layers\.3\.self_attn\.v_proj": 48,  # 12 / sqrt(16) * 16
        },
    }  # fmt: skip


def test_dense_layers_among_moe_layers_are_named_as_parameters(bases: dict[str, Path], tmp_path: Path) -> None:
    config = read_config(train(bases["mixed"], tmp_path / "a", rank=4).folder)
    assert config["target_modules"] == sorted(ATTENTION + EXPERTS)
    assert config["target_parameters"] == ["mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"]
    config = read_config(
        train(bases["mixed"], tmp_path / "b", rank=4, layers=[1], target_modules=["up_proj", "k_proj"]).folder
    )
    assert (config["target_modules"], config["target_parameters"]) == (["k_proj"], ["mlp.up_proj.weight"])


def test_tensors_of_a_half_adapted_expert(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=5, alpha=10.0, target_modules=["gate_up_proj"], layers=[1],
        rank_pattern={"up_proj": 3}, alpha_pattern={"up_proj": 12.0},
    )  # fmt: skip
    written = {w.name: own for w, own in export_form(trained.adapted, trained.shape)}
    assert {name: own and own.name for name, own in written.items()} == {
        "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": None,
    }  # fmt: skip
    tensors = load_file(trained.folder / WEIGHTS)
    size, hidden = trained.shape.expert_intermediate, trained.shape.hidden
    for expert in range(trained.shape.num_experts):
        stem = f"model.layers.1.mlp.experts.{expert}"
        gate, up, down = (
            tuple(tensors.pop(tensor_name(f"{stem}.{name}", f)) for f in ("A", "B")) for name in EXPERTS
        )  # fmt: skip
        own_gate, own_up = (
            tuple(trained.tensors[tensor_name(f"{stem}.{name}", f)] for f in ("A", "B")) for name in EXPERTS[:2]
        )
        assert torch.equal(gate[0], own_gate[0]) and torch.equal(gate[1], own_gate[1])
        assert torch.equal(up[0], torch.cat([own_up[0], torch.zeros(2, hidden)]))
        # its scale 12 / 3 = 4 is written as the file's 10 / 5 = 2
        assert torch.equal(up[1], torch.cat([2 * own_up[1], torch.zeros(size, 2)], dim=1))
        assert torch.equal(down[0], torch.zeros(5, size)) and torch.equal(down[1], torch.zeros(hidden, 5))
    assert not tensors


def test_dtype_is_kept(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", torch.bfloat16, target_modules=["up_proj"])
    assert {t.dtype for t in load_file(trained.folder / WEIGHTS).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("moe", {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 3, r"layers\.2\..*v_proj": 7}}),
        ("moe", {"target_modules": ["gate", "o_proj", "lm_head"], "alpha_pattern": {"o_proj": 5}}),
        ("moe", {"target_modules": ["k_proj", "v_proj"], "layers_to_transform": [1, 3]}),
        ("dense", {"target_modules": "all-linear", "use_rslora": True}),
        ("dense", {"target_modules": r".*\.[02]\.mlp\.(gate|down)_proj"}),
    ],
)
def test_an_adapter_made_by_stock_peft(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any]
) -> None:
    stock = get_peft_model(load_base(bases[base]), LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    stock.save_pretrained(tmp_path, save_embedding_layers=False)
    shape = model_shape(read_hf_config(bases[base]))
    tensors = load_file(tmp_path / WEIGHTS)
    read = Trained(bases[base], shape, adapted_in(tmp_path, shape), tensors, tmp_path)
    torch.testing.assert_close(logits(merged_by_hand(read)), logits(stock.eval()), rtol=0, atol=2e-5)
    assert 2 * len(read.adapted) == len(tensors)


def test_the_stacked_layout_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    get_peft_model(load_base(bases["moe"]), LoraConfig(r=2, target_modules=EXPERTS)).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert refusal(tmp_path, bases["moe"]) == (
        f"{tmp_path}/adapter_config.json does not fit this base model: target_parameters "
        f"{config['target_parameters']} mean the stacked layout; megalora reads one A and B per expert"
    )


def refusal(adapter: Path, base: Path) -> str:
    with pytest.raises(ValueError) as caught:
        adapted_in(adapter, model_shape(read_hf_config(base)))
    return str(caught.value)


def change(adapter: Path, remove: str = "", **add: Tensor) -> None:
    tensors = {name: t for name, t in load_file(adapter / WEIGHTS).items() if not remove or remove not in name}
    save_file(tensors | add, adapter / WEIGHTS)


def test_a_missing_tensor_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2)
    change(trained.folder, remove="experts.3.up_proj.lora_B")
    assert refusal(trained.folder, trained.base) == (
        f"{trained.folder}/adapter_model.safetensors lacks 4 tensors, such as "
        "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_B.weight"
    )


def test_a_tensor_without_target_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    change(trained.folder, **{"base_model.model.lm_head.lora_A.weight": torch.ones(2, 96)})
    assert refusal(trained.folder, trained.base) == (
        f"{trained.folder}/adapter_model.safetensors has, but its config does not target, 1 tensors, such as "
        "base_model.model.lm_head.lora_A.weight"
    )


def test_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    wider = make_tiny(tmp_path / "wider", hidden_size=100)
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["k_proj"])
    assert refusal(trained.folder, wider) == (
        f"{trained.folder}/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight "
        "is (2, 96), but this base model and rank need (2, 100)"
    )
    router = train(bases["moe"], tmp_path / "router", rank=2, target_modules=["gate", "k_proj"])
    assert refusal(router.folder, bases["dense"]).startswith(
        f"{router.folder}/adapter_config.json does not fit this base model: lora.target_modules: 'gate' "
        "matches nothing in this model"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{folder} is not an adapter folder: it has no adapter_config.json"),
        ('{"peft_type": "LORA"', "{folder}/adapter_config.json:1: not valid JSON (Expecting ',' delimiter, column 21)"),
        ('{"r": 2}', "{folder}/adapter_config.json: peft_type is None; megalora reads LORA only"),
        ('{"peft_type": "LOHA"}', "{folder}/adapter_config.json: peft_type is 'LOHA'; megalora reads LORA only"),
        ('{"peft_type": "LORA", "r": 2}', "{folder}/adapter_config.json: lora_alpha must be a number, got None"),
        (
            '{"peft_type": "LORA", "r": "2", "lora_alpha": 4}',
            "{folder}/adapter_config.json: r must be a number, got '2'",
        ),
    ],
)
def test_config_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path)
    assert str(caught.value) == message.format(folder=tmp_path)


def test_copying_takes_the_adapter_and_nothing_else(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "step_000003", rank=2, target_modules=["q_proj"])
    (trained.folder / "training_state").mkdir()
    copy_adapter(trained.folder, tmp_path / "new" / "out")
    copied = sorted((tmp_path / "new" / "out").iterdir())
    assert [path.name for path in copied] == [CONFIG, WEIGHTS]
    assert [path.read_bytes() for path in copied] == [(trained.folder / path.name).read_bytes() for path in copied]
    for taken in (tmp_path / "new" / "out", copied[0]):
        with pytest.raises(ValueError) as caught:
            copy_adapter(trained.folder, taken)
        assert str(caught.value) == f"{taken} exists and is not an empty folder; choose another"
